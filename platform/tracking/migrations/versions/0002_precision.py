"""In which precision a trial ran: `auto` goes by the machine, and arms that differ in it differ in more than their settings.

Revision: 0002
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision: str | None = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """NULL for trials that ended before it was kept."""
    op.add_column("trials", sa.Column("precision", sa.Text(), nullable=True))


def downgrade() -> None:
    """Forget it."""
    op.drop_column("trials", "precision")
