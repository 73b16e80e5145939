"""A run's labels with the corrected ones in place of its own: a folder of its own.

What enters: a run, a folder of corrections. What leaves: labels/ parts of the same names as those
of the run, and run.json, so that whatever reads a run reads the best labels that there are. It is a
copy, for the run must stay what its settings make of its segments, and for corrections must stay
apart: what a person has seen is truth to train on, the rest is not.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from zsplg_ray.labels import Labels
from zsplg_ray.records import LABELS
from zsplg_ray.rundir import RunFolder
from zsplg_ray.settings import complain
from zsplg_ray.views.review.corrected import VERB


def check_merged(folder: RunFolder, run: Labels) -> None:
    """Raise ValueError unless the folder is empty or an earlier merge, whole or not."""
    there = folder.read_run()
    mine = there is None or (there.get("verb") == VERB and there.get("merged") is True)
    parts = set(run.folder.parts("labels"))
    if not mine or folder.parts("segments") or not parts.issuperset(folder.parts("labels")):
        rule, fix = "an empty folder or one of an earlier merge of this run", "give another one"
        raise ValueError(complain("merged", rule, folder.uri, fix))


def write_merged(
    target: RunFolder, run: Labels, corrected: Labels | None, meta: Mapping[str, Any]
) -> tuple[int, int]:
    """All labels of a run, part by part, with corrected rows in place of its own; each image once.

    Args:
        target: Checked by `check_merged`.
        run: The run.
        corrected: What stands in place of its rows; None: nothing.
        meta: The parts' metadata.

    Returns: How many rows there are, and how many of them are corrected ones.
    """
    fixed = {i: p for p, i in enumerate(corrected.ids)} if corrected is not None else {}
    seen, count = set(), 0
    for part in run.folder.parts("labels"):
        table = run.folder.read_part("labels", part, LABELS.names).cast(LABELS)
        ids = table["image_id"].to_pylist()
        keep, wanted = [], []
        for image_id in ids:
            keep.append(image_id not in seen and image_id not in fixed)
            if image_id in fixed and image_id not in seen:
                wanted.append(fixed[image_id])
            seen.add(image_id)
        # All at once: ids of one part here stand in many parts there, and each is opened once.
        images = corrected.read(wanted) if corrected is not None else ()
        rows = [{name: getattr(image, name) for name in LABELS.names} for image in images]
        count += len(rows)
        own = table.filter(pa.array(keep, pa.bool_()))
        merged = pa.concat_tables([own, pa.Table.from_pylist(rows, schema=LABELS)])
        target.write_part("labels", part, merged.sort_by("image_id"), meta)
    return len(seen), count
