"""What the thresholds do to live traffic: counted in the workers, gathered and served by the API server.

May import `limits`, `settings`.
"""
