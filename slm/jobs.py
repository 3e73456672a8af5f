"""Jobs of a scheduler: the exit code that it sees, and launchers that start no ranks.

slm score -m hydra/launcher=slurm 'task=range(8)' ...        an array of eight that share the work
"""

import atexit
import logging
import os
import sys
from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from slm.errors import UserError

MPI_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")  # Open MPI, MPICH, MVAPICH
SUBMITTED = "SUBMITIT_EXECUTOR"  # what submitit exports in its jobs alone


class ExitCode(Callback):
    """A failed job of submitit ends with exit code 1, for the scheduler's books and its mails.

    Hydra hands a failure to the process that submitted, in a result; the job itself would end well.
    """

    def __init__(self) -> None:
        self.failed = False

    def on_job_start(self, config: DictConfig, **_: Any) -> None:
        if SUBMITTED in os.environ:
            atexit.register(self._end)  # before PyTorch is imported: what it registers runs first

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **_: Any) -> None:
        self.failed = job_return.status == JobStatus.FAILED

    def _end(self) -> None:
        """An exception here would not change the exit code."""
        if self.failed:
            logging.shutdown()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(1)


def check_launcher() -> None:
    """Of ranks that train together: mpirun says nothing that PyTorch or Lightning reads, so each
    of its processes would wait for the others, or train alone."""
    size = next((int(os.environ[name]) for name in MPI_SIZES if name in os.environ), 1)
    if size > 1 and "RANK" not in os.environ and "SLURM_PROCID" not in os.environ:
        raise UserError(
            f"started by mpirun as {size} processes, and RANK is not set: start the ranks with "
            "torchrun or srun (slm train --help)"
        )
