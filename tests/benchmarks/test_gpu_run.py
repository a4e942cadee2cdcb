"""`python -m benchmarks.gpu`: whatever a part does, and whenever the run is killed, all other results are there."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.gpu.__main__ import ignore_stale_kernels, main, parts_of, prepare, spread_tests
from benchmarks.gpu.launches import METRICS, parse
from benchmarks.gpu.parts import Part, run_parts
from benchmarks.gpu.records import RESULTS, append, digest_of_tree, read, render
from helpers.options import ROOT
from helpers.processes import wait_until
from sslfast.errors import UserError
from sslfast.kernel_library import host_isa, library_name, stamp

RECORD = (
    "from pathlib import Path; from benchmarks.gpu.records import append; append(Path({folder!r}), 'speed', op={op!r});"
)


def python(folder: Path, name: str, code: str = "", limit: float = 30) -> Part:
    """A part that notes a result and then does something."""
    return Part(name, limit, (sys.executable, "-c", RECORD.format(folder=str(folder), op=name) + code))


def is_running(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().split()[2] != "Z"
    except OSError:
        return False


def test_a_part_that_crashes_hangs_or_ends_by_a_signal_costs_that_part_only(tmp_path: Path) -> None:
    parts = [
        python(tmp_path, "first", "print('all well')"),
        python(tmp_path, "crash", "raise RuntimeError('illegal memory access')"),
        python(tmp_path, "hang", "print('waiting'); import time; time.sleep(60)", limit=4),
        python(tmp_path, "signal", "import os; os.kill(os.getpid(), 11)"),
        Part("nowhere", 5, ("no-such-tool",)),
        python(tmp_path, "last", "print('3 passed'); print('and more')"),
    ]
    parts += [Part("judged", 30, parts[0].command, summary="well", required=r"\d{3} passed")]
    assert not run_parts([replace(part, summary="well|passed|illegal|waiting") for part in parts], tmp_path, cwd=ROOT)
    records = read(tmp_path)
    assert [r["op"] for r in records if r["kind"] == "speed"] == [
        *("first", "crash", "hang", "signal", "last"),
        "first",
    ]
    endings = {r["name"]: (r["result"], r["summary"]) for r in records if r["kind"] == "part"}
    assert endings["first"] == ("passed", "all well")
    assert endings["crash"] == ("failed with status 1", "RuntimeError: illegal memory access")
    assert endings["hang"] == ("out of time after 4 s", "waiting")
    assert endings["signal"][0] == "ended by SIGSEGV"
    assert endings["nowhere"][0] == "could not start"
    assert endings["last"] == ("passed", "3 passed")
    assert endings["judged"] == (r"failed: its output lacks '\\d{3} passed'", "all well")
    log = (tmp_path / "log.txt").read_text()
    assert "Fatal Python error: Aborted" in log  # where it hung
    assert "| hang | out of time after 4 s |" in (tmp_path / "results.md").read_text()


def test_a_part_is_killed_with_its_children(tmp_path: Path) -> None:
    spawn = (
        "import subprocess, sys; print(subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']).pid); "
    )
    for ending in ("", "import time; time.sleep(60)"):
        run_parts([python(tmp_path, "parent", spawn + ending, limit=4)], tmp_path, cwd=ROOT)
        child = int(next(line for line in reversed((tmp_path / "log.txt").read_text().splitlines()) if line.isdigit()))
        wait_until(lambda child=child: not is_running(child))


def test_what_no_time_is_left_for_is_dropped_from_the_end(tmp_path: Path) -> None:
    parts = [python(tmp_path, "first", "import time; time.sleep(2)"), python(tmp_path, "last")]
    assert not run_parts(parts, tmp_path, time.monotonic() + 11, cwd=ROOT)
    endings = {r["name"]: r["result"] for r in read(tmp_path) if r["kind"] == "part"}
    assert endings == {"first": "passed", "last": "dropped"}


def test_a_part_may_have_the_time_that_others_left_and_no_more(tmp_path: Path) -> None:
    parts = [
        python(tmp_path, "quick", limit=6),
        python(tmp_path, "long", "import time; time.sleep(5)", limit=1),
        python(tmp_path, "hang", "import time; time.sleep(60)", limit=1),
        python(tmp_path, "last", limit=15),
    ]
    assert not run_parts(parts, tmp_path, time.monotonic() + 28, cwd=ROOT)
    endings = [r["result"].partition(" after")[0] for r in read(tmp_path) if r["kind"] == "part"]
    assert endings == ["passed", "passed", "out of time", "passed"]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=["SIGKILL", "SIGTERM"])
def test_a_run_killed_in_the_middle_leaves_what_it_has_learnt(tmp_path: Path, number: signal.Signals) -> None:
    wait = "print('begun'); import time; time.sleep(5)"
    code = f"""
import signal, sys
from pathlib import Path
from benchmarks.gpu.parts import Part, run_parts
signal.signal(signal.SIGTERM, signal.default_int_handler)
folder = Path({str(tmp_path)!r})
parts = {[python(tmp_path, "done"), python(tmp_path, "running", wait), python(tmp_path, "never")]!r}
run_parts(parts, folder)
"""
    run = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    log = tmp_path / "log.txt"
    wait_until(lambda: log.exists() and "\nbegun\n" in log.read_text())
    os.kill(run.pid, number)
    run.wait(30)
    records = read(tmp_path)
    assert [r["op"] for r in records if r["kind"] == "speed"] == ["done", "running"]
    endings = {r["name"]: r["result"] for r in records if r["kind"] == "part"}
    assert endings == {"done": "passed"} | ({"running": "interrupted"} if number == signal.SIGTERM else {})
    assert "| done | passed |" in (tmp_path / "results.md").read_text()


def test_a_torn_line_is_left_out_and_costs_no_other(tmp_path: Path) -> None:
    append(tmp_path, "speed", op="one", wall_ms=float("nan"))
    with (tmp_path / RESULTS).open("a") as file:
        file.write('{"kind": "speed", "op": "to')
    append(tmp_path, "speed", op="three", wall_ms=12345.6)
    assert [r["op"] for r in read(tmp_path)] == ["one", "three"]
    assert "| three | 12346 |" in render(read(tmp_path))


def test_the_page_of_no_record_is_empty(tmp_path: Path) -> None:
    assert render(read(tmp_path)) == "\n"


def test_the_limits_of_a_call_fit_its_minutes(tmp_path: Path) -> None:
    assert sum(part.limit for part in parts_of(1, tmp_path, rehearses=False)) < 9 * 60
    assert sum(part.limit for part in parts_of(2, tmp_path, rehearses=False)) < 10 * 60


def test_the_page_tells_the_parts_and_their_limits(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "gpu.md").read_text()
    for call in (1, 2):
        parts = parts_of(call, tmp_path, rehearses=False)
        rows = page.partition(f"| call {call} |")[2].partition("\n\n")[0].splitlines()[2:]
        said = [tuple(cell.strip() for cell in row.split("|")[1:3]) for row in rows]
        assert said == [
            *((part.name, f"{part.limit:.0f}") for part in parts),
            ("together", f"{sum(part.limit for part in parts):.0f}"),
        ]


def test_a_rehearsal_has_the_parts_of_a_run(tmp_path: Path) -> None:
    for call in (1, 2):
        names = [[part.name for part in parts_of(call, tmp_path, rehearses)] for rehearses in (False, True)]
        assert names[0] == names[1]


def test_kernels_of_other_sources_are_compiled_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (library_name(host_isa()), "sslfast_cuda.so"):
        (tmp_path / name).write_bytes(b"library")
        stamp(tmp_path / name)
    monkeypatch.setenv("SSLFAST_PREBUILT", str(tmp_path))
    ignore_stale_kernels()
    assert os.environ["SSLFAST_PREBUILT"] == str(tmp_path)
    (tmp_path / "sslfast_cuda.sources").write_text("older")
    ignore_stale_kernels()
    assert "SSLFAST_PREBUILT" not in os.environ


WORKERS = """
import time, torch, pytest
broken = False
torch.cuda.is_initialized = lambda: True
def synchronize():
    if broken:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
torch.cuda.synchronize = synchronize
@pytest.mark.parametrize("number", range(6))
def test_number(number):
    global broken
    broken = broken or number == 2
    assert not broken or number == 2
    if number == 4:
        time.sleep(60)
"""


def test_a_worker_whose_device_is_in_error_or_whose_test_hangs_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "test_device.py").write_text(WORKERS)
    (tmp_path / "conftest.py").write_text("def pytest_addoption(parser):\n    parser.addoption('--backend')\n")
    part = spread_tests("cuda", 60, [str(tmp_path), "--rootdir", str(tmp_path)], rehearses=False)
    command = [*part.command, "--seconds", "5"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert re.search(part.summary, result.stdout, re.MULTILINE)
    assert result.returncode != 0
    assert "2 failed, 5 passed" in result.stdout, result.stdout[-3000:] + result.stderr[-2000:]
    assert "crashed while running 'test_device.py::test_number[2]'" in result.stdout
    assert "crashed while running 'test_device.py::test_number[4]'" in result.stdout


def test_the_counters_of_ncu_are_read() -> None:
    names = list(METRICS)
    kernel = "void sslfast::cuda::<unnamed>::classify_kernel<(int)2, (bool)1>(sslfast::cuda::Decision)"
    lines = [
        "==PROF== Connected to process 1",
        '"ID","Process ID","Kernel Name","Block Size",' + ",".join(f'"{name}"' for name in names),
        '"","","","",' + ",".join(f'"{unit}"' for unit in ("ns", "byte", "byte", "%", "%", "%", "register/thread")),
        f'"0","1","{kernel}","(256, 1, 1)","12,345","100","n/a","55.5","20.1","60","40"',
        '"1","1","Memset","(1, 1, 1)","1","2","3","4","5","6","7"',
        "==WARNING== Launching the workload is taking more time than expected",
    ]
    (name, values), (other, _) = parse(lines)
    assert name == "classify_kernel<2, 1>"
    assert other == "Memset"
    assert values["time, ns"] == 12345
    assert values["% of DRAM"] == 55.5
    assert "written, byte" not in values
    assert parse(["==ERROR== ERR_NVGPUCTRPERM"]) == []


def test_results_of_other_sources_or_of_a_rehearsal_are_not_mixed(tmp_path: Path) -> None:
    append(tmp_path, "machine", run="rehearsal", sources="older")
    with pytest.raises(UserError, match="holds results of other sources or of a rehearsal"):
        prepare(tmp_path, rehearses=False)
    prepare(tmp_path, rehearses=True)
    assert read(tmp_path) == []
    append(tmp_path, "machine", run="on a GPU", sources=digest_of_tree())
    prepare(tmp_path, rehearses=False)
    assert len(read(tmp_path)) == 1
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot make the folder .*file: .* Choose another"):
        prepare(tmp_path / "file", rehearses=True)


def test_minutes_that_are_none_are_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["gpu", "--minutes", "-1"])
    assert main() == 2
    assert "--minutes is -1; it must be more than 0" in capsys.readouterr().err
