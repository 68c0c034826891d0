"""Parametrizes the test of each bench_<op>.py with the op's cases on this machine's best device."""

from rlhf_core.benchmarks import common


def pytest_generate_tests(metafunc):
    metafunc.parametrize(
        "name", common.cases(metafunc.module.__name__.split("bench_")[-1], "full", common.device())
    )
