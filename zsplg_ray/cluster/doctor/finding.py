"""What a look at the machine tells: one line, ok, warn or fail, with the fix.

What enters: texts of any origin. What leaves: findings of one harmless line each.
"""

from __future__ import annotations

import re
from typing import Literal

from zsplg_ray.safe_text import masked, one_line, shortened

Finding = dict[str, str]
"""state, told and fix; in a list what, too."""
State = Literal["ok", "warn", "fail"]


def finding(state: State, told: str, fix: str = "") -> Finding:
    """What was found, on one line and without credentials."""
    return {"state": state, "told": _line(told), "fix": _line(fix)}


def met(error: BaseException) -> Finding:
    """An error that a look met; one in the project's form brings its fix with it."""
    text = str(error)
    found = re.fullmatch(r"(.+ must be .+?, got .*?); (.+)", text, re.DOTALL)
    if found:
        return finding("fail", *found.groups())
    return finding("fail", f"{type(error).__name__}: {text}", "see the message")


def report(findings: list[Finding]) -> str:
    """The findings as lines."""
    lines = []
    for f in findings:
        lines.append(f"{f['state']:<5} {f['what']:<9} {f['told']}")
        if f["fix"]:
            lines.append(f"{'':<15} -> {f['fix']}")
    return "\n".join(lines)


def _line(text: str) -> str:
    return one_line(masked(shortened(" ".join(text.split()))))
