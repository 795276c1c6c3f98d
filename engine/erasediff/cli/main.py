"""Entry point of the command line: commands, and the exit code of every way that one can end."""

import logging
import shlex
import sys

import typer
from rich.markup import escape

from erasediff.cli.commands.audit import audit
from erasediff.cli.commands.bench import bench
from erasediff.cli.commands.compare import compare
from erasediff.cli.commands.demo import demo
from erasediff.cli.commands.evaluate import evaluate
from erasediff.cli.commands.info import info
from erasediff.cli.commands.mask import mask
from erasediff.cli.commands.patch import patch
from erasediff.cli.commands.plan import plan
from erasediff.cli.commands.sample import sample
from erasediff.cli.commands.scan import scan
from erasediff.cli.commands.train import train
from erasediff.cli.commands.unlearn import unlearn
from erasediff.cli.commands.verify import verify
from erasediff.cli.crash import as_user_error, log_crash
from erasediff.cli.output import messages, print_error, results_alone_on_stdout
from erasediff.cli.streams import lossy_streams, lost_results
from erasediff.cli.worker import is_rank, run_as_rank
from erasediff.errors import Interrupted, RunFailedError, UserError

app = typer.Typer(
    help="Remove the influence of chosen data from diffusion models, and keep the rest.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (demo, train, unlearn, verify, sample, evaluate, audit, scan, plan, bench, compare, mask, info):
    app.command()(results_alone_on_stdout(command))
app.add_typer(patch, name="patch")
app.command("estimate", hidden=True)(results_alone_on_stdout(plan))


def main() -> None:
    """Run the command line.

    Exit codes: 0 done, 1 an unexpected error (its traceback is in ``crash.log``) or results that could not be printed,
    2 invalid user input, 3 a run that diverged or changed no weight (no model is written) or an audit that found more
    than it may, 130 stopped by Ctrl-C (128 +
    the signal).
    """
    # It warns that torchvision is missing, for image processors that no command uses.
    logging.getLogger("transformers.utils.import_utils").setLevel(logging.ERROR)
    with lossy_streams() as output:
        if is_rank():
            run_as_rank(_exit_code)
        code = _reported_exit_code()
        lost = lost_results(output) if code == 0 else None
        if lost is not None:
            print_error(lost)
            code = 1
    sys.exit(code)


def _reported_exit_code() -> int:
    """Run the command, and print why where it fails."""
    try:
        return _exit_code()
    except (UserError, RunFailedError) as error:
        print_error(str(error))
        return error.exit_code
    except Exception as error:  # noqa: BLE001 (the last resort)
        known = as_user_error(error)
        print_error(log_crash(error) if known is None else str(known))
        return 1 if known is None else known.exit_code


def _exit_code() -> int:
    """Run the command that the arguments name. UserError for invalid user input, RunFailedError as the run."""
    try:
        app()
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else 0
    except Interrupted as interrupted:
        where = escape(str(interrupted.checkpoint))
        messages.print(f"Stopped after step {interrupted.step}; everything is in {where}.", soft_wrap=True)
        messages.print(f"Continue with: [bold]{escape(resume_command(sys.argv[1:]))}[/]", soft_wrap=True)
        return interrupted.exit_code
    return 0


def resume_command(arguments: list[str]) -> str:
    """The command that continues what ``arguments`` began."""
    resuming = any(argument.split("=")[0] == "--resume" for argument in arguments)
    return shlex.join(["erasediff", *arguments, *([] if resuming else ["--resume", "latest"])])
