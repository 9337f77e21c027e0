from evac_jax.telemetry.stopwatch import Stopwatch


def test_stopwatch_sums_phases_and_starts_again():
    watch = Stopwatch()
    watch.add("env", 1.0)
    watch.add("env", 2.0)
    assert watch.take() == {"env": 3.0}
    assert watch.take() == {}
