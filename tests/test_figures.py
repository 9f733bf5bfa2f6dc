"""Pictures: read back from the PNG, because what counts is what a person sees."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from methods.parts.errors import ConfigError
from pipeline.evaluate.final import interval
from pipeline.figures import attention_charts, contact_sheet, curve_charts, neighbour_charts, score_charts, style

RED, LIME = (255, 0, 0), (0, 255, 0)


def plain(height: int, width: int, colour: tuple[int, int, int]) -> np.ndarray:
    return np.full((height, width, 3), colour, np.uint8)


def read(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert image.info["dpi"][0] == pytest.approx(150, abs=0.1)
        return np.asarray(image.convert("RGB")).astype(int)


def near(picture: np.ndarray, colour: str | tuple[int, int, int], tolerance: int = 12) -> np.ndarray:
    """Mask of the pixels of about this colour."""
    from matplotlib.colors import to_rgb

    wanted = np.array([round(255 * c) for c in to_rgb(colour)] if isinstance(colour, str) else colour)
    return np.abs(picture - wanted).max(axis=-1) <= tolerance


def metrics(path: Path, rows: list[dict[str, object]], nested: bool = True) -> Path:
    lines = [{"step": r.pop("step"), "time": 1.0, "metrics": r} if nested else r for r in rows]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


# ---------------------------------------------------------------------------- contact sheet


def test_contact_sheet_shows_every_crop_and_its_box(tmp_path: Path) -> None:
    crops = {"global": np.stack([np.stack([plain(24, 24, RED)] * 2)]), "local": np.stack([np.stack([plain(8, 8, LIME)] * 4)])}
    boxes = {"global": np.array([[[0, 0, 32, 32], [4, 4, 20, 20]]]), "local": np.array([[[1, 2, 8, 8]] * 4])}
    path = contact_sheet.contact_sheet([plain(32, 32, (90, 90, 200))], crops, boxes, tmp_path / "new" / "sheet.png")
    assert path == tmp_path / "new" / "sheet.png"
    picture = read(path)
    large, small = near(picture, RED).sum(), near(picture, LIME).sum()
    assert large / 2 > 3 * small / 4 > 0  # a small crop is drawn smaller than a large one
    assert near(picture, style.BLUE).any() and near(picture, style.VERMILLION).any()
    assert [p.name for p in path.parent.iterdir()] == ["sheet.png"]  # no temporary file is left


def test_a_box_is_drawn_where_the_crop_was_cut(tmp_path: Path) -> None:
    image = plain(100, 200, (255, 255, 0))
    crops = {"global": np.stack([plain(16, 16, RED)[None]])}
    path = contact_sheet.contact_sheet([image], crops, {"global": np.array([[[50, 100, 40, 80]]])}, tmp_path / "sheet.png")
    picture = read(path)
    columns = np.flatnonzero(near(picture, (255, 255, 0)).sum(axis=0) > 20)
    rows = np.flatnonzero(near(picture, (255, 255, 0)).sum(axis=1) > 20)
    pixels = (columns[-1] - columns[0] + 1) / 200  # printed pixels per image pixel
    crop = near(picture, style.BLUE) & (np.arange(picture.shape[1]) < columns[-1])
    left, right = (np.flatnonzero(crop.sum(axis=0) > 20)[i] for i in (0, -1))
    top, bottom = (np.flatnonzero(crop.sum(axis=1) > 20)[i] for i in (0, -1))
    assert (left - columns[0]) / pixels == pytest.approx(100, abs=4)
    assert (right - columns[0]) / pixels == pytest.approx(180, abs=4)
    assert (top - rows[0]) / pixels == pytest.approx(50, abs=4)
    assert (bottom - rows[0]) / pixels == pytest.approx(90, abs=4)


def test_floats_and_bytes_give_the_same_sheet(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (2, 2, 16, 16, 3), dtype=np.uint8)
    images, boxes = [plain(375, 500, RED), plain(32, 32, LIME)], {"global": np.tile([0, 0, 32, 32], (2, 2, 1))}
    first = read(contact_sheet.contact_sheet(images, {"global": pixels}, boxes, tmp_path / "a.png"))
    second = read(contact_sheet.contact_sheet(images, {"global": pixels.astype(np.float32) / 255}, boxes, tmp_path / "b.png"))
    assert np.array_equal(first, second)


def test_a_group_without_crops_is_left_out_and_none_at_all_is_refused(tmp_path: Path) -> None:
    none = np.zeros((1, 0, 8, 8, 3), np.uint8)
    with pytest.raises(ConfigError, match="no crops to draw"):
        contact_sheet.contact_sheet([plain(8, 8, RED)], {"local": none}, {"local": np.zeros((1, 0, 4))}, tmp_path / "sheet.png")
    both = {"global": np.zeros((1, 1, 8, 8, 3), np.uint8), "local": none}
    boxes = {"global": np.array([[[0, 0, 8, 8]]]), "local": np.zeros((1, 0, 4))}
    picture = read(contact_sheet.contact_sheet([plain(8, 8, RED)], both, boxes, tmp_path / "sheet.png"))
    assert not near(picture, style.VERMILLION).any()


def test_a_picture_that_fails_leaves_the_old_one(tmp_path: Path) -> None:
    path = score_charts.score_bars([("a", 0.5)], tmp_path / "bars.png")
    before = path.read_bytes()
    with pytest.raises(RuntimeError, match="on purpose"), style.picture_at(path, 2, 2):
        raise RuntimeError("on purpose")
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


# ---------------------------------------------------------------------------- curves


def test_metrics_are_read_once_per_step_without_broken_points(tmp_path: Path) -> None:
    file = metrics(tmp_path / "metrics.jsonl", [{"step": 2, "loss": 3.0}, {"step": 1, "loss": 4.0, "lr": "nan"}, {"step": 2, "loss": 2.0}])
    file.write_text(file.read_text() + '{"step": 3, "metrics": {"loss": NaN}}\n{"step": 4, "metr')
    series = curve_charts.read_metrics(file)
    assert set(series) == {"loss"}
    assert series["loss"][0].tolist() == [1, 2] and series["loss"][1].tolist() == [4.0, 2.0]


def test_flat_lines_are_read_too(tmp_path: Path) -> None:
    file = metrics(tmp_path / "metrics.jsonl", [{"step": 1, "time": 9.0, "loss": 4.0, "embedding_std": 0.5}], nested=False)
    found = {name: values.tolist() for name, (_, values) in curve_charts.read_metrics(file).items()}
    assert found == {"loss": [4.0], "embedding_std": [0.5]}


@pytest.mark.parametrize("steps", [1, 3, 10_000])
def test_curves_of_short_and_long_runs(tmp_path: Path, steps: int) -> None:
    rows = [{"step": s, "loss": 5.0 - s / steps, "lr": 0.1, "images_per_s": 900.0, "code_entropy": 0.9} for s in range(steps)]
    file = metrics(tmp_path / "metrics.jsonl", rows)
    picture = read(curve_charts.curves(file, tmp_path / "curves.png", chance=(math.log(300), "ln K")))
    assert near(picture, style.BLUE).sum() > 100
    assert near(picture, style.VERMILLION).any()  # the dashed line at chance
    assert not near(read(curve_charts.curves(file, tmp_path / "curves.png")), style.VERMILLION).any()


def test_baselines_are_lines_at_their_heights_over_steps_of_equal_width(tmp_path: Path) -> None:
    """kNN rises from 10 to 50 % at equal steps: a straight line. The untrained backbone's is at its start, raw pixels halfway."""
    file = metrics(tmp_path / "metrics.jsonl", [{"step": s, "knn": 0.1 + 0.4 * s / 4000} for s in range(0, 4001, 100)])
    picture = read(curve_charts.curves(file, tmp_path / "curves.png", baselines={"raw pixels": 0.3}))[120:]
    curve = np.argwhere(near(picture, style.BLUE, 60))  # below the words
    ends = [curve[curve[:, 1] == column][:, 0].mean() for column in (curve[:, 1].min(), curve[:, 1].max())]
    middle = curve[curve[:, 1] == (curve[:, 1].min() + curve[:, 1].max()) // 2][:, 0].mean()
    assert middle == pytest.approx(sum(ends) / 2, abs=4)
    dashes = {c: np.flatnonzero(near(picture, c, 40).sum(axis=1) > 0.3 * np.ptp(curve[:, 1])) for c in (style.GRAY, style.VERMILLION)}
    assert np.median(dashes[style.VERMILLION]) == pytest.approx(sum(ends) / 2, abs=4)
    assert np.abs(dashes[style.GRAY] - ends[0]).min() <= 4


def test_long_curves_show_the_mean_of_each_stretch() -> None:
    from matplotlib.figure import Figure

    steps, values = np.arange(1, 10_001), np.tile([1.0, 3.0], 5000)
    axes = Figure().subplots()
    curve_charts._curve(axes, steps, values)
    (line,) = axes.lines
    assert len(line.get_xdata()) <= 201
    assert np.asarray(line.get_ydata())[-10:] == pytest.approx(2.0, abs=0.02)
    assert len(axes.collections) == 1  # the band of the range


def test_curves_without_points_say_so(tmp_path: Path) -> None:
    for file in (tmp_path / "none.jsonl", metrics(tmp_path / "empty.jsonl", [])):
        with pytest.raises(ConfigError, match="holds no points yet"):
            curve_charts.curves(file, tmp_path / "curves.png")


# ---------------------------------------------------------------------------- neighbours and bars


def test_neighbours_are_the_nearest_others_framed_by_class(tmp_path: Path) -> None:
    query, yellow = (255, 0, 255), (255, 255, 0)
    images = np.stack([plain(8, 8, c) for c in (query, RED, LIME, yellow)])
    features = np.array([[1, 0], [5, 0.5], [0, 1], [-1, 0]], np.float32)  # from 0: red, lime, yellow, whatever their lengths
    labels = np.array([0, 0, 1, 1])
    picture = read(neighbour_charts.neighbours(images, features, labels, ["a", "b"], [0], tmp_path / "n.png", k=2))
    order = [np.flatnonzero(near(picture, c).any(axis=0)) for c in (query, RED, LIME)]
    assert order[0].max() < order[1].min() and order[1].max() < order[2].min()
    assert not near(picture, yellow).any()  # third of two, and the query itself is no neighbour
    frames = [near(picture, c)[150:, :].any(axis=0) for c in (style.GREEN, style.VERMILLION)]
    assert frames[0][order[1].min() : order[1].max()].all() and frames[1][order[2].min() : order[2].max()].all()


@pytest.mark.parametrize("labels", [None, np.full(4, -1)])
def test_neighbours_without_labels_are_not_judged(tmp_path: Path, labels: np.ndarray | None) -> None:
    images = np.random.default_rng(0).integers(60, 70, (4, 8, 8, 3), dtype=np.uint8)
    picture = read(neighbour_charts.neighbours(images, np.eye(4), labels, [], [0, 1], tmp_path / "n.png", k=20))
    assert not near(picture, style.GREEN).any() and not near(picture, style.VERMILLION).any()


def test_one_image_has_no_neighbours(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no neighbours to draw"):
        neighbour_charts.neighbours(plain(8, 8, RED)[None], np.ones((1, 2)), None, [], [0], tmp_path / "n.png")


def test_bars_are_as_long_as_their_scores_and_intervals_shrink_with_images(tmp_path: Path) -> None:
    rows = [("raw pixels", 0.2), ("untrained", 0.4), ("trained", 0.8)]

    def lengths(picture: np.ndarray) -> list[float]:
        gray = near(picture, style.PALE).sum(axis=1)
        return [*np.quantile(gray[gray > 50], [0.25, 0.75]), near(picture, style.BLUE).sum(axis=1).max()]

    found = lengths(read(score_charts.score_bars(rows, tmp_path / "bars.png")))
    assert found[1] == pytest.approx(2 * found[0], rel=0.1)
    assert found[2] == pytest.approx(4 * found[0], rel=0.1)

    picture = read(score_charts.score_bars(rows, tmp_path / "majority.png", majority=0.4))
    blue, line = (np.flatnonzero(near(picture, c).sum(axis=0) > 12) for c in (style.BLUE, style.VERMILLION))
    assert (np.median(line) - blue[0]) / (blue[-1] - blue[0]) == pytest.approx(0.5, abs=0.02)  # 0.4 of 0.8

    reaches = []
    for queries in (100, 400):
        picture = read(score_charts.score_bars(rows, tmp_path / f"{queries}.png", queries=queries))
        bar = near(picture, style.BLUE)
        row = int(np.median(np.flatnonzero(bar.sum(axis=1) > 50)))  # through the middle of the lowest bar, where its interval is drawn
        columns = np.flatnonzero(bar.any(axis=0))
        gaps = np.flatnonzero(~near(picture, style.INK, 60)[row - 2 : row + 3].any(axis=0))  # columns without the interval
        low, high = interval(0.8, queries)
        reaches.append((gaps[gaps > columns[-1]][0] - gaps[gaps < columns[-1] - 5][-1]) / np.ptp(columns))
        assert reaches[-1] == pytest.approx((high - low) / 0.8, abs=0.03)
    assert reaches[0] > 1.5 * reaches[1]
    with pytest.raises(ConfigError, match="nothing to draw"):
        score_charts.score_bars([], tmp_path / "bars.png")


def test_the_interval_is_wilsons() -> None:
    low, high = interval(0.5, 100)
    assert (low, high) == pytest.approx((0.4038, 0.5962), abs=1e-4)
    assert interval(0.0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)


# ---------------------------------------------------------------------------- attention


def attention_tiles(path: Path, count: int) -> list[np.ndarray]:
    """The image, the mean, and the heads of the first row."""
    picture = read(path)
    side, top = round(0.85 * 150), round(0.95 * 150)
    lefts = [round(150 * x) for x in (0.2, 0.2 + 1.05, *(0.2 + 2.1 + 0.91 * i for i in range(count)))]
    return [picture[top : top + side, left : left + side] for left in lefts]


def test_attention_maps_show_each_head_where_it_looks(tmp_path: Path) -> None:
    """Head 1 looks at the top left patch, head 2 at the bottom right one; the mean shows both."""
    from matplotlib import colormaps

    attention = np.zeros((1, 2, 4, 4))
    attention[0, 0, 0, 0], attention[0, 1, 3, 3] = 0.5, 0.1
    path = attention_charts.attention_maps(plain(32, 32, RED)[None], attention, tmp_path / "attention.png")
    bright, dark = (tuple(round(255 * c) for c in colormaps["cividis"](end)[:3]) for end in (1.0, 0.0))
    tiles = attention_tiles(path, 2)
    assert near(tiles[0], RED).mean() > 0.9
    for tile, corner in ((tiles[2], (0, 0)), (tiles[3], (-1, -1))):
        side = len(tile)
        middle = [side // 8 if c == 0 else side - side // 8 for c in corner]  # of the patch in this corner
        assert np.abs(tile[middle[0], middle[1]] - bright).max() < 12
        assert near(tile, bright).mean() == pytest.approx(1 / 16, abs=0.02) and near(tile, dark).mean() > 0.85
    first, last, between = (tiles[1][i * len(tiles[1]) // 8, i * len(tiles[1]) // 8].sum() for i in (1, 7, 3))
    assert first > last > between + 30
    with pytest.raises(ConfigError, match="images=0"):
        attention_charts.attention_maps(np.zeros((0, 8, 8, 3), np.uint8), attention, path)


def test_a_head_that_looks_everywhere_is_not_bright_whatever_cls_keeps(tmp_path: Path) -> None:
    from matplotlib import colormaps

    attention = np.full((1, 2, 10, 10), 0.01)  # all of it goes to patches
    attention[0, 1] = 0.0001  # 1 %
    path = attention_charts.attention_maps(plain(32, 32, RED)[None], attention, tmp_path / "attention.png")
    even = tuple(round(255 * c) for c in colormaps["cividis"](1 / attention_charts.LEAST_TOP)[:3])
    assert all(near(tile, even).mean() > 0.95 for tile in attention_tiles(path, 2)[1:])
