"""calvin_env's own assets: what they consist of, and how they are fetched."""
