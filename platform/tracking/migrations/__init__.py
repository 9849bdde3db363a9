"""alembic's folder: `env.py` and one file per revision in `versions`, run by `deltalab.platform.tracking.database`."""
