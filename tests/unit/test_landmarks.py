"""MediaPipe's landmarks; needs its model and photographs in LIKENESS_SHARED."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from likeness.annotators.landmarks import open_landmarker
from likeness.conditions import CONDITIONS
from likeness.conditions.keypoints import part_points
from likeness.conditions.mask.classes import CLASS_INDEX
from likeness.data.folder import read_folder
from likeness.prepare.annotate import annotate_folder
from likeness.types import InputError

SHARED = Path(os.environ.get("LIKENESS_SHARED", Path(__file__).parents[3] / "shared"))
MODEL = SHARED / "weights" / "face_landmarker" / "face_landmarker.task"
FACES = SHARED / "data" / "celebamask-hq"
needs_model = pytest.mark.skipif(not MODEL.is_file(), reason="LIKENESS_SHARED has no face_landmarker.task")


def test_missing_and_wrong_files(tmp_path):
    with pytest.raises(InputError, match="does not exist"), open_landmarker(tmp_path / "none.task"):
        pass
    (tmp_path / "wrong.task").write_bytes(b"wrong")
    with pytest.raises(InputError, match="is not a model"), open_landmarker(tmp_path / "wrong.task"):
        pass


@needs_model
@pytest.mark.skipif(not FACES.is_dir(), reason="LIKENESS_SHARED has no hand-made masks")
def test_eyes_agree_with_hand_made_masks():
    checked = 0
    with open_landmarker(MODEL) as find:
        for path in sorted((FACES / "masks").iterdir())[:14]:
            reading = CONDITIONS["mask"].read(path)
            if reading.notes:  # for example swapped sides
                continue
            labels = reading.raw
            photo = np.array(Image.open(FACES / "images" / f"{path.stem}.jpg").convert("RGB").resize((128, 128)))
            points = find(photo)
            assert points is not None
            assert points.shape == (478, 2)
            for part in ("l_eye", "r_eye"):
                ys, xs = np.nonzero(labels == CLASS_INDEX[part])
                if len(xs) > 100:
                    middle = np.array([xs.mean(), ys.mean()]) / labels.shape[0]
                    assert np.abs(points[part_points(part, 478)].mean(0) - middle).max() < 0.03
                    checked += 1
    assert checked > 12


@needs_model
def test_images_without_a_face(tmp_path):
    photo = next(iter(sorted((SHARED / "data" / "celebamask-hq" / "images").glob("*.jpg"))), None)
    if photo is None:
        pytest.skip("LIKENESS_SHARED has no photographs")
    Image.open(photo).resize((128, 128)).save(tmp_path / "face.png")
    Image.new("RGB", (128, 128), (90, 120, 90)).save(tmp_path / "field.png")
    rows = [{"file_name": "face.png"}, {"file_name": "field.png"}]
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert annotate_folder(tmp_path, landmarker=MODEL, sketches=False) == {"keypoints": 1}
    face, field = read_folder(tmp_path)
    reading = CONDITIONS["keypoints"].read(face["keypoints_file_name"])
    assert reading.scheme.startswith("478 MediaPipe points")
    assert "keypoints_file_name" not in field
    assert CONDITIONS["keypoints"].render(reading.raw, 128, 128).max() > 100
