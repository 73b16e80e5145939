"""One command of `zsplg submit` as the tests give it."""

from tests.cluster.submit.dashboard import Dashboard
from zsplg_ray import cli

ODD = 'a b,it\'s,$HOME,`x`,"q",\\,*,über'
LABEL = ["label", "--images", "s3://b/p", "--classes", ODD, "--out", "s3://me:word@b/run"]


def submit(fake: Dashboard, *flags: str, command: list[str] | None = None) -> int:
    return cli.main(["submit", "--address", fake.address, *flags, "--", *(command or LABEL)])
