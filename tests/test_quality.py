"""What is known without a reference: scores against their definitions, volumes, components, the table."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from helpers.models import make_model
from helpers.volumes import noise
from sslfast.inference import probability_slabs
from sslfast.quality import (
    TABLE,
    QualityTable,
    WindowScores,
    disagreement,
    largest_components,
    measure,
    most_probable,
    mutual_information,
    read_rows,
    summary,
)


def softmax(count: int, classes: int, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(count)
    return (2 * torch.randn(count, classes, *shape, generator=generator)).softmax(1)


def test_scores_of_a_window_are_those_of_the_definition() -> None:
    probabilities, weight = softmax(2, 4, 5, 6, 7), torch.rand(5, 6, 7) + 0.1
    scores = WindowScores(4)
    for rows in (slice(2), slice(2, None)):  # as two windows
        scores.add(probabilities[:, :, rows], weight[rows])
    p = probabilities.double().numpy()
    w, (a, b), mean = weight.double().numpy(), p.argmax(1), p.mean(0)
    entropy = -(mean * np.log(mean)).sum(0)
    information = entropy + (p * np.log(p)).sum(1).mean(0)
    for c in range(1, 4):
        best = mean.argmax(0) == c
        expected = {
            "agreement": 2 * w[(a == c) & (b == c)].sum() / (w[a == c].sum() + w[b == c].sum()),
            "entropy": (w * entropy)[best].sum() / w[best].sum(),
            "mutual_information": (w * information)[best].sum() / w[best].sum(),
        }
        assert {name: values[c - 1] for name, values in scores.scores().items()} == pytest.approx(expected, rel=1e-5)
    assert np.allclose(mutual_information(probabilities), information, atol=1e-6)
    assert np.array_equal(disagreement(probabilities), a != b)


def test_a_class_that_no_network_predicts_has_no_score() -> None:
    probabilities = torch.tensor([0.7, 0.3]).view(1, 2, 1, 1, 1).expand(2, 2, 3, 3, 3)
    scores = WindowScores(2)
    scores.add(probabilities, torch.ones(3, 3, 3))
    assert all(math.isnan(value) for (value,) in scores.scores().values())


def test_equal_networks_agree_and_hold_no_mutual_information() -> None:
    probabilities = softmax(1, 3, 6, 6, 6).expand(2, -1, -1, -1, -1)
    scores = WindowScores(3)
    scores.add(probabilities, torch.ones(6, 6, 6))
    assert scores.scores()["agreement"] == [1, 1]
    assert scores.scores()["mutual_information"] == pytest.approx([0, 0], abs=1e-6)
    assert not disagreement(probabilities).any()


def test_details_are_blended_as_the_probabilities_are() -> None:
    model = make_model()
    model.network_a.eval()
    model.network_b.eval()
    image = noise(8, 8, 8)[None]  # one window
    details = (mutual_information, disagreement)
    (plain,) = probability_slabs(model, image, precision="fp32")
    (slab,) = probability_slabs(model, image, precision="fp32", scores=WindowScores(2), details=details)
    assert torch.equal(slab[:2], plain)
    with torch.no_grad():
        networks, batch = (model.network_a, model.network_b), torch.from_numpy(image)[None]
        both = torch.stack([network(batch)[0][0].softmax(0) for network in networks])
    assert torch.allclose(slab[2:], torch.stack([detail(both) for detail in details]), atol=1e-6)


def test_the_most_probable_class_is_the_first_of_the_highest() -> None:
    probabilities = torch.randint(3, (5, 4, 6, 7)).float()
    assert torch.equal(most_probable(probabilities), probabilities.argmax(0).byte())


def test_volumes_components_and_edges_are_measured() -> None:
    labels = np.zeros((9, 8, 7), np.int16)
    labels[1:3, 1:3, 1:3] = 300
    labels[3, 3, 3] = 300  # touches by a corner: one component
    labels[6, 6, 5] = 300
    labels[8, 2:4, 2] = 5
    large, small, none = measure(labels, [300, 5, 7], 0.5)
    assert large == {"volume_ml": 5, "components": 2, "touches_border": 0}
    assert small == {"volume_ml": 1, "components": 1, "touches_border": 1}
    assert none == {"volume_ml": 0, "components": 0, "touches_border": 0}


def test_the_largest_component_stays_and_other_classes_are_left_alone() -> None:
    labels = np.zeros((9, 9, 9), np.uint8)
    labels[1:4, 1:4, 1:4] = 2
    labels[7, 7, 7] = 2
    labels[6, 7, 7] = labels[1, 8, 8] = 1
    largest_components(labels, [2, 3])
    assert (labels == 2).sum() == 27
    assert labels[7, 7, 7] == 0
    assert (labels == 1).sum() == 2


def test_the_table_comes_back_as_it_was(tmp_path: Path) -> None:
    classes = {0: "background", 5: 'left, "upper" lobe', 7: "x"}
    table = QualityTable(classes)
    found = {"volume_ml": 12.5, "agreement": 0.75, "entropy": 0.1, "mutual_information": 0.01}
    found |= {"components": 1.0, "touches_border": 0.0}
    table.add("007", "sslfast 1", {classes[5]: found, "x": dict.fromkeys(found, math.nan)}, {"flag": "odd; very"})
    table.write(tmp_path)
    row = read_rows(tmp_path)["007"]
    assert (row["flag"], row["made"], row["agreement"]) == ("odd; very", "sslfast 1", 0.75)
    assert row['volume_ml left, "upper" lobe'] == 12.5
    assert math.isnan(row["volume_ml x"])
    assert math.isnan(row["estimated_dice"])


@pytest.mark.parametrize("content", ["", "a,b\n1,2\n", "case,agreement\nx,high\n", "\0\xff"])
def test_a_foreign_table_has_no_rows(tmp_path: Path, content: str) -> None:
    (tmp_path / TABLE).write_text(content)
    assert read_rows(tmp_path) == {}


def test_the_summary_names_flags_or_else_the_least_agreement() -> None:
    rows = [{"case": "a", "flag": "", "agreement": 0.9}, {"case": "b", "flag": "", "agreement": 0.4}]
    assert summary(rows) == "quality.csv has no flag; the networks agree least on b (0.40)"
    rows[0]["flag"] = "liver not found"
    assert summary(rows) == "quality.csv has a flag on 1 of 2 scans:\n- a: liver not found"
    assert summary([{"case": "a", "flag": "", "agreement": math.nan}]) == "quality.csv has no flag"
