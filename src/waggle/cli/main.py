"""The command line: `waggle`."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from waggle import __version__
from waggle.cli import agent, doctor, inspect, install, lab, node_policy, policy, policy_diff, takeover, why
from waggle.cli.output import printable
from waggle.errors import LoadError, WaggleError

app = typer.Typer(
    name="waggle",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)

app.command("agent")(agent.agent)
app.command("cleanup")(agent.cleanup)
app.command("install")(install.install)
app.command("uninstall")(install.uninstall)
app.command("takeover")(takeover.takeover)
app.command("status")(inspect.status)
app.command("doctor")(doctor.doctor)
app.command("flows")(inspect.flows)
app.command("why")(why.why)
app.add_typer(inspect.service_app, name="service")
app.add_typer(inspect.endpoint_app, name="endpoint")
app.add_typer(policy.app, name="policy")
policy.app.command("diff")(policy_diff.diff)
policy.app.command("check")(policy_diff.check)
app.add_typer(node_policy.app, name="node-policy")
app.add_typer(inspect.map_app, name="map")
app.add_typer(lab.app, name="lab")


def _print_version(value: bool) -> None:
    if value:
        typer.echo(f"waggle {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Container networking on BPF: Kubernetes Services without kube-proxy, iptables or Netfilter.

    Exit status:

    0 all is well;
    1 the command failed, and one line on standard error says why;
    2 wrong usage;
    3 the command worked, but what it looked at has problems.
    """


def main() -> None:
    """Entry point: errors that waggle raises on purpose become one line and exit status 1."""
    try:
        try:
            app()
        finally:
            sys.stdout.flush()  # else a reader that is gone shows at the end of the interpreter, as a traceback
    except WaggleError as error:
        print("waggle: " + "\n".join(map(printable, str(error).split("\n"))), file=sys.stderr)
        if isinstance(error, LoadError) and error.log:
            print(error.log, file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        # the reader (head, less) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)


if __name__ == "__main__":
    main()
