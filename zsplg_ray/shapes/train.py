"""Makes the embedded world's weights: `python -m zsplg_ray.shapes.train [sam|clip|backbone|all]`.

Enters: which model, for how long, where to. Leaves: weights files, and figures in the log.

How the committed ones were made. sam: 52 minutes from nothing, then 42 from there (`--start`,
`--seed 1`). clip: about 50 minutes from nothing, the first with earlier forms of this recipe
(single patches as regions too, objects in unknown colours), then 20 from there with this one
(`--start`, seeds 7 and 8), and of these two stages the mean (`--mean`): the first is better on
crops, the second on dense features. backbone: five minutes from nothing.
"""

import argparse
import logging
from pathlib import Path

import torch

from zsplg_ray.shapes.sam import WEIGHTS

logger = logging.getLogger(__name__)


def main(arguments: list[str] | None = None) -> None:
    """Parses the command line and trains."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "model", nargs="?", choices=("sam", "clip", "backbone", "all"), default="all"
    )
    parser.add_argument("--minutes", type=float, default=None, help="CPU time for each model")
    parser.add_argument("--out", type=Path, default=WEIGHTS.parent, help="folder for the weights")
    parser.add_argument("--start", type=Path, default=None, help="one model: weights to go on from")
    parser.add_argument("--mean", type=Path, nargs="+", help="clip only: average these weights")
    parser.add_argument("--seed", type=int, default=0, help="of the scenes and the first weights")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    options = parser.parse_args(arguments)
    if options.minutes is not None and options.minutes <= 0:
        parser.error(f"--minutes must be > 0, got {options.minutes}")
    if options.start is not None and options.model == "all":
        parser.error("--start belongs to one model, got all; say sam or clip")
    if options.mean and options.model != "clip":
        parser.error(f"--mean belongs to clip, got {options.model}")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(options.threads)
    limit = {} if options.minutes is None else {"minutes": options.minutes}
    if options.model in ("sam", "all"):
        from zsplg_ray.shapes import train_sam

        path = train_sam.train(out=options.out, seed=options.seed, start=options.start, **limit)
        logger.info("%s", train_sam.measure(path, range(100)))
    if options.model in ("clip", "all"):
        from zsplg_ray.shapes import train_clip

        if options.mean:
            train_clip.average(options.mean, options.out)
            return
        train_clip.train(out=options.out, seed=options.seed, start=options.start, **limit)
    if options.model in ("backbone", "all"):
        from zsplg_ray.shapes import train_backbone

        train_backbone.train(out=options.out, seed=options.seed, start=options.start, **limit)


if __name__ == "__main__":
    main()
