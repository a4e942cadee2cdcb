"""What goes wrong in a run without an error: classes that vanish, a fall of the validation Dice, an idle contrast."""

from __future__ import annotations

from collections.abc import Mapping

WINDOW = 200  # steps that are looked back on, at least half of them
ROWS = 5  # logged steps, at least, in a window
SEEN = 0.02  # Dice on the labelled patches below which a class counts as not predicted
FALL = 0.05  # validation Dice below the best one that counts as a fall, twice in a row
EARLY = 0.25  # fraction of the run in which a class may still be unseen and the contrast idle


class Health:
    """Watches the logged values of a run; says each finding once, and again if it recovers and returns.

    Args:
        classes: class names by number.
        steps: length of the run.
        method: name of the method, for the advice.
    """

    def __init__(self, classes: Mapping[int, str], steps: int, method: str) -> None:
        self.classes = classes
        self.steps = steps
        self.supervised = method == "supervised"
        self.rows: list[tuple[int, Mapping[str, float]]] = []  # of the window
        self.validated: list[tuple[int, float]] = []
        self.ever_seen: set[int] = set()
        self.said: set[str] = set()
        self.findings: list[str] = []
        """All warnings of the run."""

    def add(self, step: int, row: Mapping[str, float]) -> list[str]:
        """Takes the logged values of a step; returns the new warnings."""
        self.rows = [(at, old) for at, old in self.rows if at > step - WINDOW] + [(step, row)]
        self.ever_seen |= {c for c in self.classes if row.get(f"class_dice_{c}", 0.0) >= SEEN}
        if "validation_dice" in row:
            self.validated.append((step, row["validation_dice"]))
        found = self._validation()
        if step >= EARLY * self.steps:
            found |= self._classes() | self._contrast()
        new = dict.fromkeys(text for kind, text in found.items() if kind not in self.said)
        self.said = {*found}
        self.findings += [f"step {step}: {text}" for text in new]
        return [*new]

    def summary(self) -> str:
        """The state of the run, for the progress bar."""
        row = next((row for _, row in reversed(self.rows) if "loss_a" in row), None)  # validation has a row of its own
        if row is None:
            return ""
        parts = [f"loss {row['loss_a']:.3f} {row['loss_b']:.3f}"]
        if "foreground" in row:
            parts.append(f"foreground {100 * row['foreground']:.1f} %")
        if "kept_fraction" in row:
            counts = [row[f"reliable_{c}"] for c in self.classes if f"reliable_{c}" in row]
            share = f"reliable {100 * row['kept_fraction']:.0f} %"
            parts.append(f"{share} in {sum(n > 0 for n in counts)} of {len(counts)} classes" if counts else share)
        unseen = self.unseen()
        if unseen:
            parts.append(f"not predicted: {self._names(unseen)}")
        return ", ".join(parts)

    def unseen(self) -> list[int]:
        """Foreground classes that neither network has predicted in the last window, though the labels had them."""
        return [c for c in self.classes if c > 0 and self._is_unseen(c)]

    def _is_unseen(self, c: int) -> bool:
        name = f"class_dice_{c}"
        values = [row[name] for step, row in self.rows if name in row]
        return len(values) >= ROWS and self._spans_enough() and max(values) < SEEN

    def _spans_enough(self) -> bool:
        return self.rows[-1][0] - self.rows[0][0] >= WINDOW / 2

    def _classes(self) -> dict[str, str]:
        unseen = self.unseen()
        if not unseen:
            return {}
        lost = self.ever_seen & {*unseen}
        said = "both networks have stopped predicting" if lost else "neither network predicts"
        remedy = "train longer, lower --learning-rate, raise --foreground, or use a larger --patch"
        if not self.supervised:
            remedy += "; compare --baseline, and try --pseudo-dice-weight 0.3"
        return {f"class {c}": f"{said} {self._names(unseen)}. If this stays so, {remedy}." for c in unseen}

    def _validation(self) -> dict[str, str]:
        if len(self.validated) < 3:
            return {}
        at, best = max(self.validated, key=lambda one: one[1])
        (_, before), (_, now) = self.validated[-2:]
        if max(before, now) >= best - FALL:
            return {}
        cause = "" if self.supervised else "The unlabelled volumes may do harm: compare --baseline, or "
        remedy = f"{cause}lower --learning-rate" if cause else "Lower --learning-rate"
        return {"validation": f"validation Dice was {best:.3f} after step {at} and is {now:.3f}. {remedy}."}

    def _contrast(self) -> dict[str, str]:
        values = [row["contrast"] for _, row in self.rows if "contrast" in row]
        if len(values) < ROWS or not self._spans_enough() or any(values):
            return {}
        return {
            "contrast": "the contrastive loss is 0, because no foreground voxel is reliable. Raise --percentile, or "
            "save its time with --contrast-weight 0."
        }

    def _names(self, numbers: list[int]) -> str:
        shown = ", ".join(self.classes[c] for c in numbers[:3])
        return shown if len(numbers) <= 3 else f"{shown} and {len(numbers) - 3} more"
