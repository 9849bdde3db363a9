"""Run by alembic, never imported. The connection comes with a transaction, so a migration happens whole or not at all."""

from __future__ import annotations

from alembic import context

context.configure(connection=context.config.attributes["connection"], transactional_ddl=True)
context.run_migrations()
