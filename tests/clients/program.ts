// Reads prices, candles and statistics with the types that openapi-typescript makes of /openapi.json; compiled, not run.

import createClient from "openapi-fetch";

import type { components, paths } from "./schema";

const baseUrl = "http://127.0.0.1:8080";
const market = createClient<paths>({ baseUrl });

export async function prices(symbol: string): Promise<string> {
  const latest = await market.GET("/prices/latest/{symbol}", { params: { path: { symbol } } });
  const highest = await market.GET("/prices/highest/{exchange}/{symbol}", {
    params: { path: { exchange: "exchange1", symbol }, query: { period: "24h" } },
  });
  if (latest.error) {
    const { code, detail } = latest.error;
    return `${code}: ${detail}`;
  }
  return `${latest.data.exchange} ${latest.data.price.toFixed(2)} of ${highest.data?.price.toFixed(2) ?? "nothing"}`;
}

export async function closes(symbol: string): Promise<number[]> {
  const { data, error } = await market.GET("/candles/{symbol}", {
    params: { path: { symbol }, query: { interval: "1w", limit: 10, fill: "previous" } },
  });
  if (error) throw new Error(error.detail);
  return data.candles.filter((candle) => candle.closed && !candle.filled).map((candle) => candle.close);
}

export async function volumes(symbol: string): Promise<(string | null)[]> {
  const response = await fetch(`${baseUrl}/klines/${symbol}?interval=1M`);
  const klines: components["schemas"]["Kline"][] = await response.json();
  return klines.map(([, , , , , volume]) => volume);
}

export async function changes(): Promise<Map<string, number | null>> {
  const tickers = await market.GET("/tickers", { params: { query: { symbols: "BTCUSDT,ETHUSDT" } } });
  for (const { symbol, open, last, volume } of tickers.data?.symbols ?? []) {
    console.log(symbol, last - open, volume === null ? "unknown" : volume.toFixed(2));
  }
  const overview = await market.GET("/market");
  return new Map((overview.data?.symbols ?? []).map(({ symbol, change_percent }) => [symbol, change_percent]));
}

export async function switchToTest(token: string): Promise<string | undefined> {
  const { data } = await market.POST("/mode/test", { headers: { Authorization: `Bearer ${token}` } });
  return data?.previous;
}
