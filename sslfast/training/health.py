"""What goes wrong in a run without an error: classes that vanish, a fall of the validation Dice, an idle contrast."""

from __future__ import annotations

from collections.abc import Mapping

WINDOW = 100  # steps, at least, over which nothing must be seen before it is said
ROWS = 5  # logged steps, at least, in which a class was in the labels
SEEN = 0.02  # soft Dice on the labelled patches below which a class counts as not predicted
LEARNED = 0.2  # soft Dice from which a class was learned; random networks pass SEEN
KNOWN = 0.5  # running Dice from which a class should be found on unlabelled volumes too
FOUND = 0.2  # share of a class that the teacher decides for, below which it hardly finds it
FALL = 0.05  # validation Dice below the best one that counts as a fall, twice in a row
EARLY = 0.25  # fraction of the run in which a class may still be unseen and the contrast idle


class Health:
    """Watches the logged values of a run, and says each finding once, or again if it recovers and returns.

    Args:
        classes: class names by number.
        steps: length of the run.
        semi_supervised: whether unlabelled volumes take part.
        contrast: whether a contrastive loss has a weight.
    """

    def __init__(self, classes: Mapping[int, str], steps: int, *, semi_supervised: bool, contrast: bool) -> None:
        self.classes = classes
        self.steps = steps
        self.semi_supervised = semi_supervised
        self.contrast = contrast
        self.dice: dict[int, list[tuple[int, float]]] = {c: [] for c in classes if c > 0}  # by class: step, value
        self.found: dict[int, list[tuple[int, float]]] = {c: [] for c in self.dice}
        self.attracted: list[tuple[int, float]] = []  # step, reliable foreground voxels
        self.learned: set[int] = set()
        self.validated: list[tuple[int, float]] = []
        self.last: Mapping[str, float] = {}
        self.active: dict[str, str] = {}  # what holds now: finding, text

    @property
    def findings(self) -> list[str]:
        """The warnings that hold now."""
        return [*dict.fromkeys(self.active.values())]

    def add(self, step: int, row: Mapping[str, float]) -> list[str]:
        """Takes the logged values of a step; returns the new warnings."""
        if "loss_a" in row:  # else a validation of its own
            self.last = row
        for c, values in self.dice.items():
            if f"class_dice_{c}" in row:
                _remember(values, step, row[f"class_dice_{c}"])
                self.learned |= {c} if values[-1][1] >= LEARNED else set()
            if f"found_{c}" in row:
                known = row.get(f"running_dice_{c}", 0.0) >= KNOWN
                _remember(self.found[c], step, row[f"found_{c}"] if known else 1.0)
        if "contrast" in row:
            _remember(self.attracted, step, sum(row.get(f"reliable_{c}", 0.0) for c in self.dice))
        if "validation_dice" in row:
            self.validated.append((step, row["validation_dice"]))
        unseen = self.unseen() if step >= EARLY * self.steps else []
        found = {f"class {c}" for c in unseen}
        said = {finding: text for finding, text in self.active.items() if finding in found}
        new_classes = [c for c in unseen if f"class {c}" not in said]
        for c in new_classes:
            alike = [other for other in new_classes if (other in self.learned) == (c in self.learned)]
            said[f"class {c}"] = self._classes(alike, c in self.learned)
        others = {"validation": self._validation(), "contrast": self._contrast(step), "found": self._found(step)}
        said |= {name: self.active.get(name, text) for name, text in others.items() if text}
        new = dict.fromkeys(text for name, text in said.items() if name not in self.active)
        self.active = said
        return [*new]

    def summary(self) -> str:
        """The state of the run, for the progress bar."""
        row = self.last
        parts = [f"loss {row['loss_a']:.3f} {row['loss_b']:.3f}"] if row else []
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
        """Foreground classes that neither network has predicted lately, though the labels had them."""
        return [c for c, values in self.dice.items() if _lasts(values) and max(v for _, v in values) < SEEN]

    def _classes(self, numbers: list[int], learned: bool) -> str:
        said = "both networks have stopped predicting" if learned else "neither network predicts"
        remedy = "train longer, lower --learning-rate, raise --foreground, or use a larger --patch"
        compare = "; compare with --baseline" if self.semi_supervised else ""
        return f"{said} {self._names(numbers)}. If this stays so, {remedy}{compare}."

    def _validation(self) -> str:
        if len(self.validated) < 3:
            return ""
        at, best = max(self.validated, key=lambda one: one[1])
        (_, before), (_, now) = self.validated[-2:]
        if max(before, now) >= best - FALL:
            return ""
        remedy = "Lower --learning-rate"
        if self.semi_supervised:
            remedy = "The unlabelled volumes may do harm: compare with --baseline, or lower --learning-rate"
        return f"validation Dice was {best:.3f} after step {at} and is {now:.3f}. {remedy}."

    def _contrast(self, step: int) -> str:
        idle = self.contrast and _lasts(self.attracted) and not any(count for _, count in self.attracted)
        if not idle or step < EARLY * self.steps:
            return ""
        return "the contrastive loss does nothing, because no foreground voxel is reliable; raise --percentile"

    def _found(self, step: int) -> str:
        missing = [c for c, values in self.found.items() if _lasts(values) and max(v for _, v in values) < FOUND]
        if not missing or step < EARLY * self.steps:
            return ""
        return (
            f"{self._names(missing)}: known from labels, but hardly found on unlabelled volumes, and so not learned"
            " from them. Are they of the same kind as the labelled ones? Compare with --baseline."
        )

    def _names(self, numbers: list[int]) -> str:
        shown = ", ".join(self.classes[c] for c in numbers[:3])
        return shown if len(numbers) <= 3 else f"{shown} and {len(numbers) - 3} more"


def _remember(values: list[tuple[int, float]], step: int, value: float) -> None:
    """Appends a value; drops those that are neither among the last `ROWS` nor of the last `WINDOW` steps."""
    values.append((step, value))
    while len(values) > ROWS and values[1][0] <= step - WINDOW:
        del values[0]


def _lasts(values: list[tuple[int, float]]) -> bool:
    return len(values) >= ROWS and values[-1][0] - values[0][0] >= WINDOW
