"""`python -m sslfast.train`: trains two networks, tests them and plots the results."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import field, fields, make_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from sslfast.cli import arg, flatten, given_names, last_value, read_config, run_command
from sslfast.errors import UserError
from sslfast.methods import METHODS, find_method
from sslfast.renamed import FLAGS, old_names
from sslfast.training.config import CONFIG, DECIDED, PLANNED, TrainConfig

if TYPE_CHECKING:
    from sslfast.training.plan import Plan
    from sslfast.training.run import RunResult

if not TYPE_CHECKING:
    __getattr__ = old_names(__name__)


def train(config: TrainConfig, plan: Plan | None = None) -> None:
    """Runs the training, the test and the plots, and prints the results.

    Raises:
        UserError: some test cases could not be evaluated; raised after the results of the others are printed.
    """
    from sslfast.training.run import run  # here, so that --help does not wait for torch

    results = run(config, plan)
    if results:
        print_results(results)
    for result in results.values():
        for evaluation in result.evaluations.values():
            evaluation.raise_failed()


def print_results(results: dict[str, RunResult]) -> None:
    """Prints the test metrics of each method, then their mean Dice together, then the paths of the pictures."""
    for method, result in results.items():
        for checkpoint, evaluation in result.evaluations.items():
            print(f"\n{method}, test cases, {checkpoint}\n{evaluation.to_table()}")
    if all(result.evaluations for result in results.values()):
        print("\ntest Dice (mean over the test cases)")
        for method, result in results.items():
            unlabelled = f" + {result.unlabelled} unlabelled" if method != "supervised" else ""
            dice = ", ".join(f"{e.mean_dice:.3f} ({checkpoint})" for checkpoint, e in result.evaluations.items())
            print(f"  {method:<16} {f'{result.labelled} labelled{unlabelled}':<28} {dice}")
    for method, result in results.items():
        for finding in result.findings:
            print(f"\nwarning, {method}: {finding}")
    print("\npictures")
    for result in results.values():
        for path in result.pictures:
            print(f"  {path}")


def config_class(values: dict[str, Any], arguments: Sequence[str]) -> tuple[type[TrainConfig], dict[str, Any]]:
    """`TrainConfig` with the options of the chosen method, and the values of a config file that apply to it.

    --help without --method lists no method's options. If --method is another method than the config file's, the options
    of the file's method do not apply.
    """
    method = last_value(arguments, "--method") or values.get("method")
    if method is None and {"-h", "--help"} & {*arguments}:
        return TrainConfig, values
    method = str(method or TrainConfig.method)
    if str(values.get("method", method)) != method:
        dropped = option_names(str(values["method"]))
        values = {name: value for name, value in values.items() if name not in dropped}
    check_options({*values} | {flag[2:].partition("=")[0] for flag in arguments if flag.startswith("--")}, method)
    options = find_method(method).Options
    annotation: Any = Annotated[options, arg(name=method, help=options.__doc__)]
    added = [("options", annotation, field(default_factory=options))]
    namespace = {"__doc__": TrainConfig.__doc__}
    return make_dataclass("TrainConfig", added, bases=(TrainConfig,), namespace=namespace, frozen=True), values


def check_options(flags: set[str], method: str) -> None:
    """Raises a UserError if a flag, or a line of a config file, is an option of other methods than this one."""
    general = {"config", "resume", "help", *flatten(TrainConfig("", Path()))}
    names = {flag.replace("-", "_").removeprefix("no_") for flag in flags}
    for name in sorted(names - general - option_names(method)):
        flag = f"--{name.replace('_', '-')}"
        owners = [other for other in METHODS if name in option_names(other)]
        if owners:
            raise UserError(f"{flag} is an option of {', '.join(owners)}, not of --method {method}; remove it")
        if name in FLAGS:
            raise UserError(f"{flag} is no option any more: {FLAGS[name]}; remove it")


def option_names(method: str) -> set[str]:
    """The names of a method's own options."""
    return {one.name for one in fields(find_method(method).Options)}


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    made: list[Plan] = []

    def complete(config: TrainConfig, given: set[str]) -> dict[str, Any]:
        """The values of the flags that are left open: those of the run that is resumed, or of a plan."""
        typed = given_names(arguments, TrainConfig)
        if {"hours", "steps"} <= typed:
            raise UserError("--hours chooses --steps; give one of them")
        if config.hours is not None and not config.plan:
            raise UserError("--hours chooses --steps by the plan; leave out --no-plan, or give --steps")
        earlier = config.output / CONFIG
        restarted = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
        if (config.resume or restarted) and earlier.exists():
            return {name: value for name, value in read_config(earlier).items() if name in PLANNED - given}
        given = given - ({"steps"} if "hours" in typed else set())
        if not config.plan or config.resume or earlier.exists() or given >= DECIDED:
            return {}
        if config.hours is not None and os.environ.get("WORLD_SIZE", "1") != "1":
            raise UserError("--hours with several processes: each would time its own steps; give --steps")
        from sslfast.training.plan import make_plan  # here, so that --help does not wait for torch

        plan = make_plan(config, given)
        if plan.values:
            made.append(plan)
            if os.environ.get("RANK", "0") == "0":
                print(plan)
        return plan.values

    def run_planned(config: TrainConfig) -> None:
        train(config, made[0] if made else None)

    run_planned.__module__ = __name__
    return run_command(TrainConfig, run_planned, argv, refine=config_class, complete=complete)


if __name__ == "__main__":
    sys.exit(main())
