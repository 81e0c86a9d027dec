"""What charts read: the values of candles, Binance's arrays, and the datafeed of TradingView."""
