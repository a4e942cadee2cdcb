"""One-line mistakes, and whether the tests named for them notice: python tests/mutants.py --help."""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import tomllib
from tqdm import tqdm

ROOT = Path(__file__).parent.parent
LIST = Path("tests", "mutants.toml")
LANGUAGES = {"csrc/cuda/": "CUDA", "csrc/": "C++", "kernels/": "Triton", "": "Python"}  # by the beginning of the file
VERDICTS = ("killed", "survived", "broken")
Group = tuple[tuple[str, ...], str]  # tests, backend
HANGS = 900.0  # seconds after which a test counts as one that does not end; compiling the kernels takes minutes


@dataclass(frozen=True)
class Mutation:
    """A mistake, and who must notice it."""

    file: str
    old: str  # occurs once in the file
    new: str
    tests: tuple[str, ...]  # node ids of pytest, without parameters
    backend: str = ""  # of --backend; empty: the default

    @property
    def language(self) -> str:
        """That of the file."""
        return next(language for folder, language in LANGUAGES.items() if self.file.startswith(folder))

    @property
    def group(self) -> Group:
        """Its tests and their backend."""
        return self.tests, self.backend

    def __str__(self) -> str:
        backend = f" --backend {self.backend}" if self.backend else ""
        return f"{self.file}: {self.old.strip()} → {self.new.strip() or 'nothing'}{backend}"


def read_mutations(root: Path) -> list[Mutation]:
    """The list, with what needs no compiler first."""
    rows = tomllib.loads((root / LIST).read_text(encoding="utf-8"))["mutation"]
    mutations = [Mutation(**{**row, "tests": tuple(row["tests"])}) for row in rows]
    return sorted(mutations, key=lambda one: one.file.startswith("csrc/"))


def mutated(mutation: Mutation, text: str) -> str:
    """The text of the file with the mistake.

    Raises:
        ValueError: there is no one place for it.
    """
    count = text.count(mutation.old)
    if count != 1:
        raise ValueError(f"{mutation.file} holds {mutation.old!r} {count} times")
    return text.replace(mutation.old, mutation.new)


class Copy:
    """The files that git tracks, in a folder of their own, whose tests import these and no installed package."""

    def __init__(self, root: Path, folder: Path, compilers: int) -> None:
        self.folder = folder
        names = subprocess.run(["git", "ls-files", "-z"], cwd=root, capture_output=True, text=True, check=True).stdout
        for name in filter(None, names.split("\0")):
            if (root / name).is_file():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(root / name, folder / name)
        others = ("PYTEST_", "SSLFAST_PREBUILT")  # of a pytest that runs this, and kernels without the mistake
        self.environment = {name: os.environ[name] for name in os.environ if not name.startswith(others)}
        self.environment |= {
            "PYTHONPATH": os.pathsep.join([os.fspath(folder), os.environ.get("PYTHONPATH", "")]),  # before an install
            "PYTHONDONTWRITEBYTECODE": "1",  # which a change within a second that keeps the size would not outdate
            "MAX_JOBS": str(compilers),
        }

    def ends(self, tests: Sequence[str], backend: str, **environment: str) -> tuple[str, str]:
        """How the tests end: passed, failed or broken; and the end of what they print."""
        flags = ["--backend", backend] if backend else []
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *flags, *tests]
        with subprocess.Popen(
            command, cwd=self.folder, env={**self.environment, **environment}, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, errors="replace", start_new_session=True,
        ) as process:  # fmt: skip
            try:
                said = process.communicate(timeout=HANGS)[0]
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                return "failed", f"no end after {HANGS:g} s"
        code, last = process.returncode, said.strip()[-2000:]
        if "the compiler failed:" in said or (code == 0 and not re.search(r"\b\d+ passed\b", last)):  # but skipped
            return "broken", last
        return "passed" if code == 0 else "failed" if code == 1 or code < 0 else "broken", last

    def baseline(self, group: Group) -> str:
        """What is wrong with the tests if there is no mistake; empty if they pass."""
        end, said = self.ends(*group)
        return "" if end == "passed" else f"without the mistake they are {end}:\n{said}"

    def judge(self, mutation: Mutation) -> tuple[str, str]:
        """The verdict, and what was printed. Kernels with a mistake are compiled beside the copy, and removed."""
        path = self.folder / mutation.file
        original = path.read_text(encoding="utf-8")
        with tempfile.TemporaryDirectory(dir=self.folder.parent) as cache:
            own = {"SSLFAST_CACHE": cache} if mutation.file.startswith("csrc/") else {}
            try:
                path.write_text(mutated(mutation, original), encoding="utf-8")
                end, said = self.ends(*mutation.group, **own)
            except ValueError as error:
                end, said = "broken", str(error)
            finally:
                path.write_text(original, encoding="utf-8")
        return {"passed": "survived", "failed": "killed"}.get(end, end), said


def run(root: Path, mutations: Sequence[Mutation], jobs: int) -> dict[Mutation, tuple[str, str]]:
    """The verdict on each mutation, and what was printed. The tests are run without any first, each group once."""
    groups = list(dict.fromkeys(mutation.group for mutation in mutations))
    with (
        tempfile.TemporaryDirectory(prefix="mutants-") as folder,
        ThreadPoolExecutor(jobs) as pool,
        tqdm(total=len(groups) + len(mutations), unit="run", smoothing=0) as progress,
    ):
        copies: SimpleQueue[Copy] = SimpleQueue()
        for job in range(jobs):
            copies.put(Copy(root, Path(folder, str(job)).resolve(), max(1, (os.cpu_count() or 1) // jobs)))

        def on_a_copy(task: Callable[[Copy, Any], Any], item: Any) -> Any:
            copy = copies.get()
            try:
                return task(copy, item)
            finally:
                copies.put(copy)

        def results(task: Callable[[Copy, Any], Any], items: Sequence[Any]) -> Iterator[tuple[Any, Any]]:
            futures = {pool.submit(on_a_copy, task, item): item for item in items}
            try:
                for future in as_completed(futures):
                    yield futures[future], future.result()
                    progress.update()
            finally:  # of Ctrl-C, which waits for the tests that run, and for no others
                for future in futures:
                    future.cancel()

        faults = dict(results(Copy.baseline, groups))
        verdicts = {mutation: ("broken", faults[mutation.group]) for mutation in mutations if faults[mutation.group]}
        progress.update(len(verdicts))
        for mutation, outcome in results(Copy.judge, [one for one in mutations if one not in verdicts]):
            verdicts[mutation] = outcome
            if outcome[0] != "killed":
                progress.write(f"{outcome[0]}: {mutation}", file=sys.stderr)
    return verdicts


def main(argv: Sequence[str] | None = None, root: Path = ROOT) -> int:
    """The exit status: 1 if a mutation survived or cannot be tried."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", metavar="REGEX", help="those whose line in --list it is found in")
    parser.add_argument("--jobs", type=int, default=1, help="copies of the repository in use at a time (default: 1)")
    parser.add_argument("--list", action="store_true", help="print the mutations and their tests, and run none")
    flags = parser.parse_args(argv)
    mutations = [one for one in read_mutations(root) if re.search(flags.only, str(one))]
    if flags.list:
        print("\n".join(f"{one}\n    {' '.join(one.tests)}" for one in mutations))
        return 0
    started, verdicts = time.monotonic(), run(root, mutations, flags.jobs)
    for mutation, (verdict, said) in verdicts.items():
        if verdict != "killed":
            print(f"{verdict}: {mutation}\n    {' '.join(mutation.tests)}")
            print("".join(f"    {line}\n" for line in said.splitlines()[-15:]) if verdict == "broken" else "", end="")
    count = Counter((mutation.language, verdict) for mutation, (verdict, _) in verdicts.items())
    print(f"{'':8}" + "".join(f"{verdict:>10}" for verdict in VERDICTS) + f"{'of':>6}")
    for language in sorted(LANGUAGES.values()):
        each = [count[language, verdict] for verdict in VERDICTS]
        print(f"{language:8}" + "".join(f"{number:>10}" for number in each) + f"{sum(each):>6}")
    killed = sum(verdict == "killed" for verdict, _ in verdicts.values())
    print(f"{killed} of {len(mutations)} mutations are noticed, {(time.monotonic() - started) / 60:.0f} min")
    return int(killed < len(mutations))


if __name__ == "__main__":
    sys.exit(main())
