"""How hypothesis runs where it damages files: the same examples every time, and nothing kept."""

from hypothesis import HealthCheck, settings


def fuzz(max_examples: int) -> settings:
    """Settings of a test with so many examples."""
    return settings(
        max_examples=max_examples,
        derandomize=True,
        database=None,
        deadline=None,
        # the fixtures hold files that every example writes anew
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )
