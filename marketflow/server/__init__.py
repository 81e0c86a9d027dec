"""The server under the API: uvicorn with limits, worker processes, messages to the service manager."""
