"""Opening the ledger's database: the connection, the lock, the migrations, and errors said in the user's words.

SQLite runs in WAL mode (a reader never stops the writer), waits up to 30 s for a lock and checks foreign keys. pysqlite's own
idea of transactions leaves `CREATE TABLE` outside of them, so they are opened here: a migration, and every write, is whole.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

from filelock import FileLock, Timeout
from sqlalchemy import URL, Connection, Engine, create_engine, event, inspect, make_url, select, table, text
from sqlalchemy import column as sql_column
from sqlalchemy.exc import (
    ArgumentError,
    DBAPIError,
    IntegrityError,
    InterfaceError,
    InternalError,
    NoSuchModuleError,
    OperationalError,
    StatementError,
)
from sqlalchemy.pool import QueuePool

from ...errors import UserError
from .schema import HEAD, Base

LOCK_SECONDS = 30
_ADVISORY_LOCK = 0x64656C74616C6162  # "deltalab" in ASCII: the name of our lock on a PostgreSQL server
_MIGRATIONS = Path(__file__).parent / "migrations"
_VERSION = table("alembic_version", sql_column("version_num"))


def sqlite_url(path: Path) -> str:
    """The URL of a SQLite file, whatever characters its path has; absolute, so that a change of folder does not move it."""
    return URL.create("sqlite", database=str(path.absolute())).render_as_string(hide_password=False)


def parse_url(url: str | URL) -> URL:
    """A URL that the ledger can live at. `postgres://` and `postgresql://` mean the driver psycopg.

    Raises UserError for anything that is not SQLite in a file or PostgreSQL.
    """
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):
        raise UserError(
            f"the ledger's URL {_without_password(str(url))!r} cannot be read. "
            "Valid: sqlite:////folder/ledger.db, postgresql://user@host:5432/database"
        ) from None
    backend = parsed.drivername.partition("+")[0]
    if parsed.drivername in ("postgres", "postgresql"):
        parsed = parsed.set(drivername="postgresql+psycopg")
    elif backend not in ("sqlite", "postgresql"):
        raise UserError(f"the ledger cannot live in {backend!r} ({show(parsed)}). Valid: sqlite, postgresql")
    if backend == "sqlite" and parsed.database in (None, "", ":memory:"):
        raise UserError("the ledger needs a SQLite file, not a database in memory. Valid: sqlite:////folder/ledger.db")
    return parsed


def show(url: URL) -> str:
    """The URL for a message: no password, neither before the host nor among the options."""
    hidden = {key: "***" for key in url.query if "password" in key.lower()}
    return url.update_query_dict(hidden).render_as_string(hide_password=True)


def _without_password(text_: str) -> str:
    return re.sub(r"(?<=:)[^:/@]+(?=@)", "***", re.sub(r"(password=)[^&\s]+", r"\1***", text_))


def connect(url: str | URL, *, create: bool) -> Engine:
    """An engine on a ledger that stands at `HEAD`.

    `create=False` is for readers: a ledger that does not exist is an error, not an empty ledger.
    Raises UserError where the place cannot be used; its message has no password.
    """
    parsed = parse_url(url)
    path = sqlite_file(parsed)
    if path is not None:
        if not create and not path.exists():
            raise no_results(path.parent)
        _check_file(path, "the ledger", write=create)
    engine = _engine(parsed) if create or path is None or not _is_sealed(path) else _sealed_engine(path)
    try:
        with explained(parsed):
            _bring_to_head(engine, parsed, create=create)
    except BaseException:
        engine.dispose()
        raise
    return engine


def sqlite_file(url: URL) -> Path | None:
    """The file behind a SQLite URL; None for a server."""
    return Path(url.database) if url.get_backend_name() == "sqlite" and url.database else None


def _check_file(path: Path, what: str, *, write: bool) -> None:
    """What SQLite itself would only call "unable to open database file"."""
    if not path.parent.is_dir():
        raise UserError(f"{what}'s folder {path.parent} does not exist or is not a folder")
    if path.is_dir():
        raise UserError(f"{what} {path} is a folder; it must be a file")
    mode, effective = os.W_OK if write else os.R_OK, os.access in os.supports_effective_ids
    if not os.access(path if path.exists() else path.parent, mode, effective_ids=effective):
        raise UserError(f"{what} {path} cannot be {'written' if write else 'read'}: permission denied")


def _is_sealed(path: Path) -> bool:
    """A ledger at rest in a folder that this user may only read: a colleague's results."""
    effective = os.access in os.supports_effective_ids
    return not os.access(path.parent, os.W_OK, effective_ids=effective) and not Path(f"{path}-wal").exists()


def _sealed_engine(path: Path) -> Engine:
    """Even to read, SQLite in WAL mode makes a file next to the database, unless it is told that nothing will change."""

    def open_file() -> sqlite3.Connection:
        return sqlite3.connect(f"file:{quote(str(path.absolute()))}?immutable=1", uri=True, check_same_thread=False)

    return create_engine("sqlite://", creator=open_file, poolclass=QueuePool)


def check_reachable(url: URL, what: str) -> None:
    """Raises UserError where a database does not answer. It may be empty; a SQLite file need not exist."""
    path = sqlite_file(url)
    if path is not None:
        _check_file(path, what, write=True)
        if not path.exists():
            return
    engine = _engine(url)
    try:
        with explained(url, what), engine.connect() as connection:
            inspect(connection).get_table_names()
    finally:
        engine.dispose()


class NoResultsError(UserError):
    """There is no ledger yet: nothing has been run under this root."""


def no_results(place: object) -> NoResultsError:
    return NoResultsError(f"no results yet under {place}; run `deltalab run STUDY` first")


def _engine(url: URL) -> Engine:
    server = sqlite_file(url) is None
    try:
        if server:
            return create_engine(url, pool_pre_ping=True, connect_args={"connect_timeout": 10})
        engine = create_engine(url, connect_args={"timeout": LOCK_SECONDS})
    except (NoSuchModuleError, ModuleNotFoundError, ImportError) as error:
        raise UserError(
            f"no driver for {url.drivername} is installed ({error}). For PostgreSQL: pip install 'deltalab[postgres]'"
        ) from None
    event.listen(engine, "connect", _prepare_sqlite)
    event.listen(engine, "begin", _begin_sqlite)
    return engine


def _prepare_sqlite(connection: Any, _record: object) -> None:
    connection.isolation_level = None  # we open transactions ourselves, see _begin_sqlite
    connection.execute("PRAGMA foreign_keys = ON")
    connection.execute("PRAGMA synchronous = NORMAL")  # in WAL mode: nothing is lost by a kill, at most by a power cut


def _begin_sqlite(connection: Connection) -> None:
    """Writers take the lock at once: one that had read first could not wait for another writer, it would fail."""
    writes = connection.get_execution_options().get("deltalab_writes", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


def writer(engine: Engine) -> Engine:
    """The same pool of connections, for transactions that write."""
    return engine.execution_options(deltalab_writes=True)


# --------------------------------------------------------------------------------------------------------- migrations


def _bring_to_head(engine: Engine, url: URL, *, create: bool) -> None:
    with engine.connect() as connection:
        found = _revision(connection, url)
    if found == HEAD:
        return
    if found is None and not create:
        raise no_results(show(url))
    with exclusive(url):
        if sqlite_file(url) is not None:
            _switch_to_wal(engine)
        with writer(engine).begin() as connection:
            if _revision(connection, url) != HEAD:  # another process may have been here while we waited
                migrate(connection)


@contextlib.contextmanager
def exclusive(url: URL) -> Iterator[None]:
    """One process at a time creates or migrates what is at `url`.

    SQLite: a lock file next to the database, `NAME.lock`. PostgreSQL: an advisory lock, which the server drops with its holder.
    """
    path = sqlite_file(url)
    if path is None:
        engine = _engine(url)
        try:
            with engine.begin() as connection:
                connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _ADVISORY_LOCK})
                yield
        finally:
            engine.dispose()
        return
    lock = FileLock(f"{path}.lock")
    try:
        lock.acquire(timeout=10 * LOCK_SECONDS)
    except Timeout:
        raise UserError(f"{path} has been locked by another process for more than {10 * LOCK_SECONDS} s") from None
    except OSError as error:
        raise UserError(f"{path.parent} cannot be written: {error.strerror or error}") from None
    try:
        yield
    finally:
        lock.release()


def _switch_to_wal(engine: Engine) -> None:
    connection = engine.raw_connection()  # not inside a transaction, where SQLite refuses to change the mode
    try:
        with contextlib.suppress(sqlite3.OperationalError):  # in use, or on a disk that cannot: slower, not wrong
            connection.cursor().execute("PRAGMA journal_mode = WAL")
    finally:
        connection.close()


def _revision(connection: Connection, url: URL) -> str | None:
    """The revision that the database stands at, None for an empty one. Raises UserError for one that is not ours to use."""
    names = set(inspect(connection).get_table_names())
    ours = set(Base.metadata.tables)
    if "alembic_version" not in names:
        if names & ours:
            listed = ", ".join(sorted(names & ours))
            raise UserError(f"{show(url)} is not a deltalab ledger: another program's tables are in the way ({listed})")
        return None
    found = connection.execute(select(_VERSION.c.version_num)).scalar()
    if found is None:
        return None
    if found != HEAD and "launch_trials" not in names:
        raise UserError(f"{show(url)} belongs to another program (MLflow?), the ledger needs a database of its own")
    if found != HEAD and found not in known_revisions():
        raise UserError(
            f"the ledger at {show(url)} was written by a newer deltalab (revision {found}; this version knows up to {HEAD}). "
            "Upgrade deltalab, or use another --root"
        )
    return str(found)


def _script_config() -> Any:
    from alembic.config import Config

    config = Config()
    # The path goes through configparser, to which a percent sign is the start of a substitution.
    config.set_main_option("script_location", str(_MIGRATIONS).replace("%", "%%"))
    return config


def known_revisions() -> list[str]:
    """All revisions that this version can migrate from, newest first."""
    from alembic.script import ScriptDirectory

    return [script.revision for script in ScriptDirectory.from_config(_script_config()).walk_revisions()]


def migrate(connection: Connection, revision: str = "head") -> None:
    """Bring the database to `revision` inside the connection's transaction."""
    from alembic import command

    logging.getLogger("alembic").setLevel(logging.WARNING)  # MLflow turns it up to INFO: a dozen lines per new database
    config = _script_config()
    config.attributes["connection"] = connection
    command.upgrade(config, revision)


# ------------------------------------------------------------------------------------------------------------- errors


@contextlib.contextmanager
def explained(url: URL, what: str = "the ledger") -> Iterator[None]:
    """Turns what a database refuses (its disk, its server, its file) into a UserError without traceback and password."""
    try:
        yield
    except IntegrityError:
        raise  # ours to repair, not the user's
    except DBAPIError as error:
        said = " ".join(str(error.orig).split())
        reason = _file_reason(said, url, what) if sqlite_file(url) else _server_reason(error, said, url, what)
        if reason is None:
            raise
        raise UserError(reason) from None
    except StatementError as error:  # a value that is none, found before the database saw it
        raise error.orig or error from None


def _server_reason(error: DBAPIError, said: str, url: URL, what: str) -> str | None:
    forbidden = getattr(error.orig, "sqlstate", None) == "42501"
    if not (forbidden or isinstance(error, OperationalError | InterfaceError | InternalError)):
        return None
    secrets = [url.password, *(value for key, value in url.query.items() if "password" in key.lower())]
    for secret in secrets:
        said = said.replace(str(secret), "***") if secret else said
    hint = " Create it first: createdb NAME" if re.search('database ".*" does not exist', said) else ""
    return f"{what} at {show(url)} cannot be used: {said}.{hint}"


def _file_reason(said: str, url: URL, what: str) -> str | None:
    path = sqlite_file(url)
    if "not a database" in said:
        return f"{what} {path} is not a SQLite database: it was damaged, or is another file. Move it away or use another --root"
    if "malformed" in said:
        return f"{what} {path} is damaged ({said}). Restore it from a backup, or move it away and run the study again"
    if "locked" in said:
        return f"{what} {path} has been locked by another process for more than {LOCK_SECONDS} s"
    if re.search("unable to open|readonly|disk", said):
        return f"{what} {path} cannot be used: {said}"
    return None
