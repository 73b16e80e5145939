"""What is told of Ray's long messages."""

import pytest

from zsplg_ray.cluster.session import last_line


class Long(Exception):
    """One of Ray's."""


IN_A_TASK = """ray::MapWorker(MapBatches(ImageActor)).submit() (pid=1740)
  File "work.py", line 7, in write
    raise OSError(errno.ENOSPC, "No space left on device", "/out/part")
{cause}

The above exception was the direct cause of the following exception:

ray::MapWorker(MapBatches(ImageActor)).submit() (pid=1740)
ray.exceptions.UserCodeException: UDF failed to process a data block.
Failed to apply UDF transform after 1/1 attempts (total backoff 0.0s).
To change retry attempts, configure `ray.data.DataContext.get_current()`"""


@pytest.mark.parametrize(
    ("message", "told"),
    [
        ("several lines\nthe last one\n", "Long: the last one"),
        ("", "Long: no message"),
        (
            IN_A_TASK.format(cause="OSError: [Errno 28] No space left on device: '/out/part'"),
            "OSError: [Errno 28] No space left on device: '/out/part'",
        ),
        (
            IN_A_TASK.format(cause="zsplg_ray.settings.WorkError: another run has gone on"),
            "WorkError: another run has gone on",
        ),
        (
            "  File work.py, line 7, in read\nTypeError: not a path\n"
            "Failed to apply UDF transform after 1/1 attempts.\nTo change retry attempts, do this.",
            "TypeError: not a path",
        ),
        (
            "OSError: busy\n\nThe above exception was the direct cause of the following exception:"
            "\n\nValueError: weights must be those of the driver",
            "Long: ValueError: weights must be those of the driver",
        ),
    ],
)
def test_the_line_that_says_why(message, told):
    assert last_line(Long(message)) == told
