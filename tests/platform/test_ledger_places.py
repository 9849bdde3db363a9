"""Where a ledger may stand, how it gets its tables, and what is said when it cannot be used."""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import psycopg
import pytest
from sqlalchemy import create_engine, inspect, text

from deltalab.errors import UserError
from deltalab.platform.tracking import Ledger, TrialPlan, sqlite_url
from deltalab.platform.tracking.database import known_revisions, migrate, parse_url, show, writer
from deltalab.platform.tracking.schema import HEAD, Base

Spawn = Callable[..., "subprocess.Popen[str]"]
OrdinaryUser = Callable[[], AbstractContextManager[None]]


def launch(ledger: Ledger, trials: int = 1) -> int:
    plans = [TrialPlan(f"h{n}", "gdn", "a", "main", n, "gdn", "mqar", 1, "d", {"width": 64}, 100) for n in range(trials)]
    return ledger.start_launch("quick", "deltalab run quick", {}, {}, plans)


# ------------------------------------------------------------------------------------------------------------- migrations


def test_the_migrations_make_the_tables_of_the_schema(ledger_url: str) -> None:
    from alembic.autogenerate import compare_metadata
    from alembic.migration import MigrationContext

    Ledger.open(ledger_url).close()
    engine = create_engine(parse_url(ledger_url))
    with engine.connect() as connection:
        differences = compare_metadata(MigrationContext.configure(connection), Base.metadata)
        assert differences == [], "schema.py changed: add a revision to migrations/versions and move HEAD"
        inspector = inspect(connection)
        for table in Base.metadata.sorted_tables:
            assert {key["name"] for key in inspector.get_foreign_keys(table.name)} == {
                key.name for key in table.foreign_key_constraints
            }
            assert inspector.get_pk_constraint(table.name)["name"] == table.primary_key.name
    engine.dispose()
    assert known_revisions()[0] == HEAD


def test_down_to_nothing_and_up_again(ledger_url: str) -> None:
    from alembic import command

    from deltalab.platform.tracking.database import _script_config

    with Ledger.open(ledger_url) as ledger:
        with writer(ledger._engine).begin() as connection:
            config = _script_config()
            config.attributes["connection"] = connection
            command.downgrade(config, "base")
        assert inspect(ledger._engine).get_table_names() == ["alembic_version"]
        with writer(ledger._engine).begin() as connection:
            migrate(connection)
        launch(ledger)


def test_what_an_earlier_version_wrote_is_kept(ledger_url: str) -> None:
    with Ledger.open(ledger_url) as ledger:
        launch(ledger)
        ledger.finish_trial(ledger.trials("quick")[0].id, "finished", {"test/loss": 0.5}, backend="torch")
    engine = create_engine(parse_url(ledger_url))
    with engine.begin() as connection:
        connection.execute(text("ALTER TABLE trials DROP COLUMN precision"))
    engine.dispose()
    set_revision(ledger_url, "0001")
    with Ledger.open(ledger_url, create=False) as ledger:  # a reader brings it up to date as well
        (row,) = ledger.trials("quick")
        assert (row.backend, row.precision, ledger.measurements([row.id])[row.id]) == ("torch", None, {"test/loss": 0.5})
        ledger.finish_trial(row.id, "finished", {}, precision="bf16")
        assert ledger.trials("quick")[0].precision == "bf16"


def test_a_migration_that_fails_leaves_an_empty_database(ledger_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from alembic.operations import Operations

    create = Operations.create_table

    def broken(self: Operations, name: str, *columns: object, **options: object) -> object:
        if name == "measurements":
            raise RuntimeError("power cut")
        return create(self, name, *columns, **options)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(Operations, "create_table", broken)
        with pytest.raises(RuntimeError, match="power cut"):
            Ledger.open(ledger_url)
    engine = create_engine(parse_url(ledger_url))
    assert inspect(engine).get_table_names() == []
    engine.dispose()
    with Ledger.open(ledger_url) as ledger:
        launch(ledger)


OPENER = """
import sys
from deltalab.platform.tracking import Ledger
print("ready", flush=True)
sys.stdin.readline()
for _ in range(3):
    with Ledger.open(sys.argv[1]) as ledger:
        ledger.start_launch("quick", sys.argv[2], {}, {}, [])
"""


def test_processes_that_open_a_new_ledger_at_once(ledger_url: str, spawn: Spawn) -> None:
    children = [spawn(OPENER, ledger_url, number) for number in range(3)]
    for child in children:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n", child.communicate()[1]
    for child in children:
        assert child.stdin is not None
        child.stdin.write("\n")
        child.stdin.flush()
    for child in children:
        _, errors = child.communicate(timeout=120)
        assert (child.returncode, errors) == (0, "")
    with Ledger.open(ledger_url) as ledger:
        assert len(ledger.launches("quick")) == 9


def test_a_reader_does_not_stop_the_writer(ledger_url: str) -> None:
    with Ledger.open(ledger_url) as ledger, Ledger.open(ledger_url, create=False) as reader, reader._reading() as session:
        assert session.execute(text("SELECT count(*) FROM trials")).scalar() == 0
        launch(ledger)
        assert len(ledger.trials("quick")) == 1


# ------------------------------------------------------------------------------------------------------------ wrong places


def set_revision(url: str, revision: str) -> None:
    engine = create_engine(parse_url(url))
    with engine.begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = :new"), {"new": revision})
    engine.dispose()


@pytest.mark.parametrize("create", [True, False])
def test_a_ledger_of_a_newer_deltalab_is_left_alone(ledger_url: str, create: bool) -> None:
    Ledger.open(ledger_url).close()
    set_revision(ledger_url, "9999")
    with pytest.raises(UserError, match=f"newer deltalab .revision 9999; this version knows up to {HEAD}.*another --root"):
        Ledger.open(ledger_url, create=create)
    set_revision(ledger_url, HEAD)
    Ledger.open(ledger_url, create=create).close()


def test_reading_where_nothing_was_run(ledger_url: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no results yet under .*run `deltalab run STUDY` first"):
        Ledger.open(ledger_url, create=False)
    with pytest.raises(UserError, match="no results yet"):
        Ledger.open(sqlite_url(tmp_path / "absent" / "ledger.db"), create=False)
    assert list(tmp_path.iterdir()) == [], "a reader leaves nothing behind"
    (tmp_path / "empty.db").touch()
    with pytest.raises(UserError, match="no results yet"):
        Ledger.open(sqlite_url(tmp_path / "empty.db"), create=False)


def test_files_that_are_no_ledger(tmp_path: Path) -> None:
    (tmp_path / "text.db").write_text("this is a poem, not a database\n" * 100)
    with pytest.raises(UserError, match=r"text.db is not a SQLite database"):
        Ledger.open(sqlite_url(tmp_path / "text.db"))
    with pytest.raises(UserError, match="is a folder"):
        Ledger.open(sqlite_url(tmp_path))
    with pytest.raises(UserError, match="does not exist or is not a folder"):
        Ledger.open(sqlite_url(tmp_path / "absent" / "ledger.db"))
    with pytest.raises(UserError, match="does not exist or is not a folder"):
        Ledger.open(sqlite_url(tmp_path / "text.db" / "ledger.db"))


@pytest.mark.parametrize("create", [True, False])
def test_a_damaged_ledger_says_so(tmp_path: Path, create: bool) -> None:
    path = tmp_path / "ledger.db"
    with Ledger.open(sqlite_url(path)) as ledger:
        launch(ledger, 300)
    whole = path.read_bytes()
    path.write_bytes(b"\x00" * 2000 + whole[2000:])
    with pytest.raises(UserError, match="is not a SQLite database"):
        Ledger.open(sqlite_url(path), create=create)
    path.write_bytes(whole[:4096] + os.urandom(len(whole) - 4096))
    with pytest.raises(UserError, match=r"ledger\.db is damaged"), Ledger.open(sqlite_url(path), create=create) as ledger:
        ledger.trials("quick")


def test_another_programs_tables(ledger_url: str) -> None:
    engine = create_engine(parse_url(ledger_url))
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE trials (id INTEGER)"))
    with pytest.raises(UserError, match=r"not a deltalab ledger: another program's tables are in the way \(trials\)"):
        Ledger.open(ledger_url)
    with engine.begin() as connection:
        connection.execute(text("DROP TABLE trials"))
        connection.execute(text("CREATE TABLE alembic_version (version_num VARCHAR(32))"))
        connection.execute(text("INSERT INTO alembic_version VALUES ('1bd49d398cd23')"))
    with pytest.raises(UserError, match="belongs to another program"):
        Ledger.open(ledger_url)
    engine.dispose()


def test_a_folder_that_cannot_be_written(ordinary_user: OrdinaryUser) -> None:
    folder = Path(tempfile.mkdtemp())
    try:
        with Ledger.open(sqlite_url(folder / "old.db")) as ledger:
            launch(ledger)
        folder.chmod(0o555)
        (folder / "old.db").chmod(0o444)
        with ordinary_user():
            with pytest.raises(UserError, match="cannot be written: permission denied"):
                Ledger.open(sqlite_url(folder / "new.db"))
            with pytest.raises(UserError, match="cannot be written: permission denied"):
                Ledger.open(sqlite_url(folder / "old.db"))
            with Ledger.open(sqlite_url(folder / "old.db"), create=False) as ledger:
                assert len(ledger.trials("quick")) == 1, "a colleague's results can be read"
                with pytest.raises(UserError, match="cannot be used: attempt to write a readonly database"):
                    launch(ledger)
    finally:
        folder.chmod(0o755)
        shutil.rmtree(folder)


def test_a_locked_ledger_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deltalab.platform.tracking.database.LOCK_SECONDS", 0.1)
    url = sqlite_url(tmp_path / "ledger.db")
    with Ledger.open(url) as ledger:
        other = sqlite3.connect(tmp_path / "ledger.db", isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(UserError, match=r"ledger.db has been locked by another process"):
            launch(ledger)
        other.execute("ROLLBACK")
        other.close()
        launch(ledger)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("poem", "'poem' cannot be read"),
        ("postgresql://me:secret@host:port/x", r"'postgresql://me:\*\*\*@host:port/x' cannot be read"),
        ("mysql://me:secret@host/x", r"cannot live in 'mysql' \(mysql://me:\*\*\*@host/x\). Valid: sqlite, postgresql"),
        ("sqlite://", "not a database in memory"),
        ("sqlite:///:memory:", "not a database in memory"),
        ("postgresql+pg9000://me:secret@host/x", r"no driver for postgresql\+pg9000 is installed.*'deltalab\[postgres\]'"),
        ("postgresql://me:secret@127.0.0.1:1/x", r"postgresql\+psycopg://me:\*\*\*@127.0.0.1:1/x cannot be used"),
    ],
)
def test_urls_that_cannot_be_used(url: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as raised:
        Ledger.open(url)
    assert "secret" not in str(raised.value)


def test_passwords_are_hidden_everywhere() -> None:
    shown = show(parse_url("postgresql://me:secret@host/x?sslpassword=secret&sslmode=require"))
    assert "secret" not in shown
    assert "sslmode=require" in shown


def test_a_postgres_database_that_does_not_exist(postgres_url: str) -> None:
    with pytest.raises(UserError, match=r"does not exist\. Create it first: createdb NAME"):
        Ledger.open(postgres_url.replace("/t", "/absent_t", 1))


def test_a_postgres_user_without_rights(postgres_url: str, postgres_server: Path) -> None:
    with psycopg.connect(host=str(postgres_server), user="postgres", dbname="postgres", autocommit=True) as connection:
        connection.execute("DROP ROLE IF EXISTS guest")
        connection.execute("CREATE ROLE guest LOGIN")
    with pytest.raises(UserError, match=r"the ledger at .*guest@.* cannot be used: permission denied for schema public"):
        Ledger.open(postgres_url.replace("postgres@", "guest@"))


def test_postgres_without_a_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(UserError, match=r"pip install 'deltalab\[postgres\]'"):
        Ledger.open("postgresql://me@host/x")


@pytest.mark.parametrize("name", ["a b", "50% off", "what?", "c#", "ünï", "%41", "q'uote\"d"])
def test_any_folder_name_works(tmp_path: Path, name: str) -> None:
    folder = tmp_path / name
    folder.mkdir()
    with Ledger.open(sqlite_url(folder / "ledger.db")) as ledger:
        launch(ledger)
    assert (folder / "ledger.db").exists()
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_sqlite_is_in_wal_mode_and_closes_cleanly(tmp_path: Path) -> None:
    with Ledger.open(sqlite_url(tmp_path / "ledger.db")) as ledger:
        launch(ledger)
        with ledger._reading() as session:
            assert session.execute(text("PRAGMA journal_mode")).scalar() == "wal"
            assert session.execute(text("PRAGMA foreign_keys")).scalar() == 1
            assert session.execute(text("PRAGMA busy_timeout")).scalar() == 30_000
    assert not (tmp_path / "ledger.db-wal").exists()
