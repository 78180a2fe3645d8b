"""The conformance suite catches broken methods, each by the name of a test, and lets a sound one pass."""

import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from pathlib import Path

import pytest

from peft_core.testing.methods import FAULTS, SOUND

# Fault → tests of the suite that must fail on it.
CAUGHT_BY = {
    "scale-twice-in-merge": {
        "test_merged_weight_computes_what_forward_computes",
        "test_merged_model_computes_what_the_adapted_model_computes",
    },
    "forgotten-transpose": {
        "test_merged_weight_computes_what_forward_computes",
        "test_merged_model_computes_what_the_adapted_model_computes",
        "test_factors_reproduce_the_merged_weight",
    },
    "gradient-missing-a-borrower": {"test_gradients_equal_the_reference_in_float64"},
    "forward-changes-the-base": {"test_forward_and_backward_leave_the_base_alone"},
    "input-gradient-overwritten": {
        "test_accumulating_pair_equals_the_reference",
        "test_input_gradients_equal_the_reference_in_float64",
    },
    "does-not-start-at-zero": {"test_attach_keeps_the_function"},
    "functions-capture-weights": {"test_copies_are_whole_and_independent"},
    "parameter-registered-twice": {"test_attach_adds_one_key_per_tensor_and_changes_no_other"},
    "binding-regenerated-on-load": {"test_loading_into_a_fresh_model_is_exact"},
    "dropout-ignored": {"test_dropout_keeps_the_mean_and_stops_in_evaluation"},
    "first-site's-options": {"test_overrides_reach_their_sites"},
    "steps-draw-unkeyed": {"test_resuming_goes_on_as_if_nothing_had_happened"},
    "weight-moved-twice": {"test_moving_weight_keeps_the_function"},
}


def test_every_fault_is_caught_by_name_and_sound_methods_pass(tmp_path: Path) -> None:
    """One test, since each of xdist's workers would run the suite for itself."""
    failed = _failures(tmp_path / "report.xml")
    assert {method.name: failed[method.name] for method in SOUND} == {method.name: set() for method in SOUND}
    assert set(CAUGHT_BY) == {fault.name for fault in FAULTS}
    missed = {fault: tests - failed[fault] for fault, tests in CAUGHT_BY.items() if tests - failed[fault]}
    assert not missed


def _failures(report: Path) -> dict[str, set[str]]:
    """Method → tests that failed on it, of one run of the suite for all."""
    _run_suite(report)
    found: dict[str, set[str]] = defaultdict(set)
    for case in ElementTree.parse(report).iter("testcase"):
        test, _, parameters = case.attrib["name"].partition("[")
        method = parameters.partition("(")[0]
        found[method].update([test] if case.find("failure") is not None or case.find("error") is not None else [])
    return found


def _run_suite(report: Path) -> None:
    methods = [argument for method in (*SOUND, *FAULTS) for argument in ("--method", method.name)]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "--pyargs",
        "peft_core.testing",
        "-p",
        "peft_core.testing.methods",
    ]
    selection = ["-k", "odd and not compil", "-q", "-p", "no:cacheprovider", "--tb=no"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    run = subprocess.run(
        [*command, *methods, *selection, f"--junitxml={report}"],
        cwd=report.parent,  # as a user's project: this repository's pytest settings do not hold there
        env=environment,
        capture_output=True,
        text=True,
    )
    assert run.returncode == pytest.ExitCode.TESTS_FAILED, run.stdout[-3000:] + run.stderr[-3000:]
