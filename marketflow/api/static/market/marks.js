/** Marks below the candles: what the venue's own candles confirm or contradict, and where trades were missing. */

/** How far above the lower edge of the pane they are, in CSS pixels, and how large. */
const RISE = 8;
const SIZE = 3.5;

/** Confirmations and the venue's own, which nearly all can be, are left out where candles are narrower than this (CSS pixels). */
const NARROW = 3;

/** Names of marks and of their colours. */
export const STATES = /** @type {const} */ (["verified", "differs", "incomplete", "filled", "venue"]);

const COMMON = new Set(["verified", "venue"]);

/**
 * The marks of a candle.
 * @param {import("./candles.js").Candle} candle
 * @returns {(typeof STATES[number])[]}
 */
export function statesOf({ verified, complete, filled, source }) {
  /** @type {(typeof STATES[number])[]} */
  const states = [];
  if (verified === true) states.push("verified");
  if (verified === false) states.push("differs");
  if (complete === false) states.push("incomplete");
  if (filled) states.push("filled");
  if (source === "venue") states.push("venue");
  return states;
}

/** A primitive of Lightweight Charts, to be attached to the series of candles. */
export class Marks {
  constructor() {
    /** @type {import("./slots.js").Slot[]} */
    this.slots = [];
    /** @type {Record<string, string>} */
    this.colours = {};
    const view = { zOrder: () => /** @type {const} */ ("normal"), renderer: () => ({ draw: (/** @type {any} */ target) => this.#draw(target) }) };
    this.views = [view];
  }

  /** @param {any} parameters of the library */
  attached({ chart, requestUpdate }) {
    this.scale = chart.timeScale();
    this.requestUpdate = requestUpdate;
  }

  paneViews() {
    return this.views;
  }

  /** Takes the colours of the page. @param {CSSStyleDeclaration} style */
  colour(style) {
    for (const state of STATES) this.colours[state] = style.getPropertyValue(`--${state}`).trim();
    this.requestUpdate();
  }

  /** Marks other candles, when those are drawn. @param {import("./slots.js").Slot[]} slots all, oldest first */
  set(slots) {
    this.slots = slots;
  }

  /** @param {any} target */
  #draw(target) {
    const range = this.scale.getVisibleLogicalRange();
    if (range === null) return;
    const first = Math.max(0, Math.floor(range.from));
    const last = Math.min(this.slots.length - 1, Math.ceil(range.to));
    const narrow = this.scale.options().barSpacing < NARROW;
    target.useBitmapCoordinateSpace((/** @type {any} */ { context, bitmapSize, horizontalPixelRatio, verticalPixelRatio }) => {
      for (let index = first; index <= last; index += 1) {
        const { candle } = this.slots[index];
        const states = candle === null ? [] : statesOf(candle).filter((state) => !narrow || !COMMON.has(state));
        if (states.length === 0) continue;
        const x = this.scale.logicalToCoordinate(index);
        if (x === null) continue;
        states.forEach((state, row) => {
          context.save();
          const above = (RISE + row * 2.5 * SIZE) * verticalPixelRatio;
          context.translate(Math.round(x * horizontalPixelRatio) + 0.5, Math.round(bitmapSize.height - above) + 0.5);
          context.scale(horizontalPixelRatio, verticalPixelRatio);
          SHAPES[state](context, this.colours[state]);
          context.restore();
        });
      }
    });
  }
}

/** A dot, a cross, an open diamond, a full one and an open square: not by their colours alone are they to be told apart. */
const SHAPES = {
  /** @param {CanvasRenderingContext2D} context @param {string} colour */
  verified(context, colour) {
    context.fillStyle = colour;
    context.beginPath();
    context.arc(0, 0, 0.6 * SIZE, 0, 2 * Math.PI);
    context.fill();
  },
  /** @param {CanvasRenderingContext2D} context @param {string} colour */
  differs(context, colour) {
    stroke(context, colour, [[-SIZE, -SIZE, SIZE, SIZE], [-SIZE, SIZE, SIZE, -SIZE]]);
  },
  /** @param {CanvasRenderingContext2D} context @param {string} colour */
  venue(context, colour) {
    const side = 0.6 * SIZE;
    stroke(context, colour, [[-side, -side, side, -side], [side, -side, side, side], [side, side, -side, side], [-side, side, -side, -side]]);
  },
  /** @param {CanvasRenderingContext2D} context @param {string} colour */
  incomplete(context, colour) {
    stroke(context, colour, [[-SIZE, 0, 0, -SIZE], [0, -SIZE, SIZE, 0], [SIZE, 0, 0, SIZE], [0, SIZE, -SIZE, 0]]);
  },
  /** @param {CanvasRenderingContext2D} context @param {string} colour */
  filled(context, colour) {
    context.fillStyle = colour;
    context.beginPath();
    for (const [x, y] of [[-1, 0], [0, -1], [1, 0], [0, 1]]) context.lineTo(1.3 * SIZE * x, 1.3 * SIZE * y);
    context.fill();
  },
};

/** @param {CanvasRenderingContext2D} context @param {string} colour @param {number[][]} lines */
function stroke(context, colour, lines) {
  context.strokeStyle = colour;
  context.lineWidth = 1.75;
  context.lineCap = "round";
  context.beginPath();
  for (const [fromX, fromY, toX, toY] of lines) {
    context.moveTo(fromX, fromY);
    context.lineTo(toX, toY);
  }
  context.stroke();
}
