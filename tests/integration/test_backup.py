"""The server's database is dumped while a fleet runs, lost, and restored: the commands are those of docs/fleet.md."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest

from tests.integration.building import ROOT
from tests.integration.fleet import Fleet, kill, postgres_programs, started_fleet, until

pytestmark = [pytest.mark.long, pytest.mark.timeout(1800)]


@pytest.fixture
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    with started_fleet(tmp_path_factory.mktemp("fleet")) as fleet:
        fleet.worker("portable", "portable")
        until(lambda: fleet.server.ask("work_pools/filter", {}))
        fleet.prefect("deploy", "--all")
        yield fleet


def completed(fleet: Fleet) -> list[str]:
    runs = fleet.server.ask("flow_runs/filter", {"flow_runs": {"state": {"type": {"any_": ["COMPLETED"]}}}})
    return [run["id"] for run in runs]


def database(fleet: Fleet) -> dict[str, list[Any]]:
    """Return what people and runs have left on the server, by kind."""
    kinds = ("deployments", "work_pools", "automations", "variables", "flow_runs", "logs")
    return {
        kind: sorted((one["id"], one.get("name", "")) for one in fleet.server.ask(f"{kind}/filter", {}))
        for kind in kinds
    }


def test_a_dump_brings_back_deployments_settings_and_history_and_the_worker_goes_on(fleet: Fleet):
    commands = re.findall(
        r"^(?:pg_dump|dropdb|createdb|pg_restore) .*$", (ROOT / "docs" / "fleet.md").read_text(), re.MULTILINE
    )
    assert [command.split()[0] for command in commands] == ["pg_dump", "dropdb", "createdb", "pg_restore"]
    env = {"PATH": f"{postgres_programs()}:/usr/bin:/bin", "DATABASE": fleet.database.replace("+asyncpg", "")}

    def run(command: str) -> None:
        subprocess.run(["sh", "-ec", command], cwd=fleet.folder, env=env, check=True)

    fleet.prefect("variable", "set", "enginery_store", "s3://models/engines")
    fleet.prefect("deployment", "run", "watch/host", "--param", 'recipes=["digits.yaml"]')
    first = until(lambda: completed(fleet), why=lambda: fleet.said("portable"))
    until(lambda: len(fleet.server.ask("logs/filter", {})) > 5)
    dump, *restore = commands
    before = database(fleet)
    run(dump)
    kill(fleet.processes["server"])
    for command in restore:
        run(command)
    fleet.start_server()
    after = database(fleet)
    assert all(after[kind] for kind in after)
    for kind, found in before.items():
        assert [one for one in found if one not in after[kind]] == [], kind
    fleet.prefect("deployment", "run", "watch/host", "--param", 'recipes=["digits.yaml"]')
    until(lambda: len(completed(fleet)) == len(first) + 1, why=lambda: fleet.said("portable"))
