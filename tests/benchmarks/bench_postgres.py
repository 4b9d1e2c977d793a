"""Two workers over a real PostgreSQL, and one that is killed: skipped where there is none.

It takes Debian's package ``postgresql`` (or any other that puts initdb and pg_ctl on the path) and ``psycopg2-binary``.
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]
WORK = """
import sys
sys.path.insert(0, {tests!r})
from test_search import run_logged
from lib.methods import search
from lib.grid import blocks
from lib.teachers import networks
from lib.grid.plan import NoiseSchedule, Plan, trailing
if __name__ == "__main__":
    search.HEARTBEAT = 1
    unet = networks.unet((1, 16, 16), [8, 8, 16], 1, 4)
    teacher = Plan.full(trailing(10, 1000), NoiseSchedule.of(networks.noise_schedule()), blocks.describe(unet).names)
    found = run_logged(teacher, {url!r}, {log!r}, trials={trials})
    print(len({{one.plan.key for one in found}}))
"""


@pytest.fixture
def database():
    """A server of its own on a socket in a folder, and its URL."""
    pytest.importorskip("psycopg2", reason="python -m pip install psycopg2-binary")
    places = [*Path("/usr/lib/postgresql").glob("*/bin"), Path(shutil.which("initdb") or "/nowhere/initdb").parent]
    bin_ = next((place for place in places if (place / "initdb").exists()), None)
    if bin_ is None:
        pytest.skip("there is no PostgreSQL here: apt-get install postgresql")
    folder = Path(tempfile.mkdtemp(dir="/tmp"))
    user = ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []  # it refuses to run as root
    if user:
        shutil.chown(folder, "postgres")

    def run(*words):
        subprocess.run([*user, *map(str, words)], check=True, capture_output=True, cwd=folder)

    run(bin_ / "initdb", "--pgdata", folder / "data", "--auth", "trust", "--username", "tester")
    run(bin_ / "pg_ctl", "--pgdata", folder / "data", "--wait", "--log", folder / "log", "--options",
        f"-k {folder} -c listen_addresses=''", "start")
    try:
        yield f"postgresql+psycopg2://tester@/postgres?host={folder}"
    finally:
        run(bin_ / "pg_ctl", "--pgdata", folder / "data", "--wait", "--mode", "immediate", "stop")
        shutil.rmtree(folder, ignore_errors=True)


def start(url, log, trials):
    code = WORK.format(tests=str(TESTS), url=url, log=str(log), trials=trials)
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)


def begun(log):
    return [line.split() for line in log.read_text().splitlines()] if log.exists() else []


def test_two_workers_over_postgresql(database, tmp_path):
    log = tmp_path / "log"
    workers = [start(database, log, 60) for _ in range(2)]
    assert [worker.communicate()[0].strip() for worker in workers] == ["60", "60"]
    lines = begun(log)
    shares = [sum(who == one for who, _ in lines) for one in {who for who, _ in lines}]
    print(f"\ntwo workers over PostgreSQL: {len(lines)} evaluations for 60 plans, {shares} each")
    assert len(shares) == 2 and len(lines) == len({key for _, key in lines}) <= 61


def test_a_killed_workers_trial_is_queued_again(database, tmp_path):
    log = tmp_path / "log"
    killed = start(database, log, 40)
    while killed.poll() is None and len(begun(log)) < 5:
        time.sleep(0.005)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    lost = begun(log)[-1][1]
    time.sleep(3)  # longer than two signs of life are apart
    assert start(database, log, 40).communicate()[0].strip() == "40"
    after = [key for who, key in begun(log) if who != str(killed.pid)]
    print(f"\nthe killed worker's plan was evaluated again: {lost in after}")
    assert lost in after
