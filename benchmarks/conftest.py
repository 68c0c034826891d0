"""Gives every test in a bench_<op>.py its parameter `name`: the op's cases on this machine's best device."""

from rlhf_core.benchmarks import common


def pytest_generate_tests(metafunc):
    metafunc.parametrize(
        "name", common.cases(metafunc.module.__name__.split("bench_")[-1], "full", common.device())
    )
