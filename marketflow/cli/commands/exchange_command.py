"""`marketflow exchange`: a simulated exchange."""

from pathlib import Path

import click

from marketflow import __version__
from marketflow.cli.command import Command
from marketflow.cli.options import Setting, Venue, option


@click.command("exchange", cls=Command, short_help="Run a simulated exchange.")
@option("--port", metavar="N", type=Setting("http.port"), required=True, help="Port to listen on; 0: any free port.")
@option(
    "--host", metavar="H", type=Setting("http.host"), default="127.0.0.1", help="Address to listen on.  [127.0.0.1]"
)
@option(
    "--name", metavar="NAME", type=Setting("exchange.name"), default="exchange1", help="Name in the log.  [exchange1]"
)
@option("--rate", metavar="R", type=Setting("generator.rate"), help="Ticks per second.  [100]")
@option("--seed", metavar="N", type=Setting("generator.seed"), help="Seed: generate the same ticks at every start.")
@option("--symbols", metavar="A,B", type=Setting("symbols"), help="Symbols.  [those of the default settings]")
@option("--venue", metavar="V", type=Venue(), help="Speak the protocol of this venue instead.")
@option(
    "--replay",
    metavar="FILE...",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    variadic=True,
    help="Serve recorded frames again, by the protocol of their venue.",
)
@option("--speed", metavar="X", type=Setting("replay.speed"), help="Speed of the replay.  [1]")
@click.version_option(__version__, message="marketflow %(version)s")
def command(
    port: int,
    host: str,
    name: str,
    rate: float | None,
    seed: int | None,
    symbols: tuple[str, ...] | None,
    venue: str | None,
    replay: tuple[Path, ...],
    speed: float | None,
) -> int:
    """Serve generated ticks over TCP, one JSON object a line, to every client that connects.

    With --venue: serve them by the WebSocket and REST protocols of that venue, both on the same port.

    With --replay: serve what record.dir has kept of an exchange, once a client has subscribed, with its times moved to
    now. At another --speed than 1 times keep their distances and leave the clock behind; clients need a larger
    flow.max_clock_skew_seconds.
    """
    if replay and (venue or symbols or rate is not None or seed is not None):
        raise click.UsageError("--replay: venue, symbols, rate and seed are those of the record")
    if speed is not None and not replay:
        raise click.UsageError("--speed: nothing is replayed without --replay")
    from marketflow import logs
    from marketflow.settings import Settings

    defaults = Settings()
    logs.setup(defaults.log.level, defaults.log.format)

    if replay:
        from marketflow.feeds.recording.replay import serve

        return serve(replay, speed or 1.0, host, port)

    rate = rate or defaults.generator.rate
    if venue:
        from marketflow.feeds.simulated import simulated_venue

        return simulated_venue.run(venue, host, port, symbols or defaults.symbols, rate, seed)

    from marketflow.feeds import simulator

    return simulator.serve(name, host, port, symbols or defaults.symbols, rate, seed)
