/** A line of a few prices in a cell. */

const SVG = "http://www.w3.org/2000/svg";
const WIDTH = 64;
const HEIGHT = 20;
const MARGIN = 2;

export class Sparkline {
  constructor() {
    this.element = document.createElementNS(SVG, "svg");
    this.element.setAttribute("viewBox", `0 0 ${WIDTH} ${HEIGHT}`);
    this.element.setAttribute("aria-hidden", "true");
    this.element.setAttribute("class", "spark blank");
    this.line = document.createElementNS(SVG, "polyline");
    this.element.append(this.line);
    this.points = "";
  }

  /** @param {number[]} values oldest first; fewer than two are no line */
  show(values) {
    const [lowest, highest] = [Math.min(...values), Math.max(...values)];
    const across = (WIDTH - 2 * MARGIN) / (values.length - 1);
    const up = (HEIGHT - 2 * MARGIN) / (highest - lowest || 1);
    const points = values.length < 2 ? "" : values
      .map((value, index) => `${(MARGIN + index * across).toFixed(1)},${(HEIGHT - MARGIN - (value - lowest) * up).toFixed(1)}`)
      .join(" ");
    if (points === this.points) return;
    this.points = points;
    this.element.classList.toggle("blank", points === "");
    this.line.setAttribute("points", points);
  }
}
