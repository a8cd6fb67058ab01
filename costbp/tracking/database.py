"""The local MLflow database: made whole or not at all, and made anew where it is broken."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path

from costbp.console import say
from costbp.files import atomic, ensure_folder, lock


def prepare(path: Path) -> None:
    """See to it that a database of the installed MLflow is there; one at a time does.

    Its migrations can't be taken up where they were broken off, so they run on a file of another
    name. A database that can't be used is set aside: the run store holds all that was in it.
    """
    with lock(path.with_name(".lock")):
        for left in path.parent.glob(f".{path.name}.*.tmp*"):  # of a process that was killed
            left.unlink()
        if path.exists() and (flaw := _flaw(path)):
            _set_aside(path, flaw)
        if not path.exists():
            _create(path)


def _flaw(path: Path) -> str | None:
    """Why MLflow can't use a database; None where it can."""
    import mlflow.store.db_migrations
    from alembic.script import ScriptDirectory
    from mlflow.store.db.base_sql_model import Base
    from mlflow.store.tracking import sqlalchemy_store  # noqa: F401  (defines the tables)

    head = ScriptDirectory(mlflow.store.db_migrations.__path__[0]).get_current_head()
    try:
        with closing(sqlite3.connect(path, timeout=20)) as connection:
            (said,) = connection.execute("PRAGMA quick_check(1)").fetchone()
            if said != "ok":
                return str(said).splitlines()[-1]
            for table in Base.metadata.sorted_tables:
                columns = ", ".join(f'{table.name}."{column.name}"' for column in table.columns)
                connection.execute(f"SELECT {columns} FROM {table.name} LIMIT 0")
            found = connection.execute("SELECT version_num FROM alembic_version").fetchall()
    except sqlite3.OperationalError as error:
        if str(error).startswith("no such"):
            return str(error)
        raise  # locked, read-only, no space: not the database's fault
    except sqlite3.DatabaseError as error:
        return str(error)
    return None if found == [(head,)] else "half made, or of another version of MLflow"


def _set_aside(path: Path, flaw: str) -> None:
    aside = path.with_name(f"{path.stem}.set-aside-{datetime.now(UTC):%Y%m%dT%H%M%S%f}.db")
    for suffix in ("-wal", "-shm", ""):  # the new one mustn't find the journals of the old
        if (part := Path(f"{path}{suffix}")).exists():
            part.rename(f"{aside}{suffix}")
    say(f"warning: {path} can't be used ({flaw}); it is now {aside.name}, and made anew")


def _create(path: Path) -> None:
    """A new database, in WAL mode: the UI reads, and other jobs write, while one writes."""
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    artifacts = ensure_folder(path.parent / "artifacts").resolve().as_uri()
    with atomic(path) as temporary:
        try:
            store = SqlAlchemyStore(f"sqlite:///{temporary}", artifacts)
            store.engine.dispose()
            with closing(sqlite3.connect(temporary)) as connection:
                connection.execute("PRAGMA journal_mode=WAL")
        finally:
            for suffix in ("-journal", "-wal", "-shm"):
                Path(f"{temporary}{suffix}").unlink(missing_ok=True)
        for suffix in ("-wal", "-shm"):  # left where somebody deleted the database alone
            Path(f"{path}{suffix}").unlink(missing_ok=True)
