"""The exit code that a scheduler sees, and launchers that start no ranks."""

import sys

import pytest
from hydra.core.utils import JobReturn, JobStatus

import warm
from slm.errors import UserError
from slm.jobs import MPI_SIZES, ExitCode, check_launcher

JOB = """
import atexit, sys
from hydra.core.utils import JobReturn, JobStatus
from slm.jobs import ExitCode

exit_code = ExitCode()
exit_code.on_job_start(None)
atexit.register(print, "what a library registers still runs")
exit_code.on_job_end(None, JobReturn(status=JobStatus[sys.argv[1]]))
"""


@pytest.mark.parametrize(
    ("status", "submitted", "code"),
    [("FAILED", True, 1), ("COMPLETED", True, 0), ("FAILED", False, 0)],
)
def test_a_failed_job_of_submitit_has_a_failing_exit_code(monkeypatch, status, submitted, code):
    if submitted:
        monkeypatch.setenv("SUBMITIT_EXECUTOR", "slurm")
    done = warm.run([sys.executable, "-c", JOB, status], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (code, "what a library registers still runs\n")


def test_a_job_that_ends_well_after_one_that_failed_is_no_failure():
    exit_code = ExitCode()
    for status in (JobStatus.FAILED, JobStatus.COMPLETED):  # in one process, as joblib's
        job: JobReturn = JobReturn(status=status)
        exit_code.on_job_end(None, job)  # type: ignore[arg-type]
    assert not exit_code.failed


@pytest.mark.parametrize("name", MPI_SIZES)
def test_mpirun_starts_no_ranks(monkeypatch, name):
    for other in (*MPI_SIZES, "RANK", "SLURM_PROCID"):
        monkeypatch.delenv(other, raising=False)
    monkeypatch.setenv(name, "1")
    check_launcher()
    monkeypatch.setenv(name, "2")
    with pytest.raises(UserError, match="mpirun as 2 processes.*torchrun or srun"):
        check_launcher()
    monkeypatch.setenv("RANK", "0")
    check_launcher()
