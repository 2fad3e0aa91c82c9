"""Latent stores: entries match their files, nothing is encoded twice, nothing is stale."""

from __future__ import annotations

import json
import os
import random
import shutil
from hashlib import sha256
from pathlib import Path

import pytest
import sample_datasets
import torch
from PIL import Image
from safetensors.torch import load_file

from builders import run, save_components, tiny_flux_pipeline
from likeness import cli
from likeness.conditions import CONDITIONS
from likeness.data.folder import captions_of, column_of, mirrored_caption, read_folder, read_photo
from likeness.data.store import Store
from likeness.encoders.components import Components, load_components
from likeness.encoders.latent import LatentCodec, to_tensor
from likeness.encoders.text import truncated_text
from likeness.prepare.encode import encode_folder
from likeness.prepare.synthetic import write_synthetic
from likeness.train.batches import make_batch
from likeness.train.config import DataRecipe
from likeness.types import InputError

SIZE, FACES, FILES = 32, 10, 4
IMAGES = FACES * FILES


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    """Ten synthetic faces with three conditions each, tiny components, and their store."""
    root = tmp_path_factory.mktemp("prepared")
    write_synthetic(root / "faces", FACES, SIZE, seed=0)
    save_components(root / "components")
    encode_folder(root / "faces", root / "shards", load_components(root / "components"), size=SIZE)
    return root


@pytest.fixture(scope="module")
def parts(prepared) -> Components:
    return load_components(prepared / "components")


@pytest.fixture
def faces(prepared, tmp_path) -> Path:
    """A copy of the faces for a test to change."""
    return Path(shutil.copytree(prepared / "faces", tmp_path / "faces"))


def read_rows(faces: Path) -> list[dict]:
    return [json.loads(line) for line in (faces / "train/metadata.jsonl").read_text().splitlines()]


def write_rows(faces: Path, rows: list[dict]) -> None:
    (faces / "train/metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def change_pixel(path: Path, value: int) -> None:
    """Change one pixel of an image, keeping its modification time."""
    state = path.stat()
    photo = Image.open(path)
    photo.putpixel((value % SIZE, value // SIZE % SIZE), value % 256 if photo.mode in "LP" else (value % 256, 9, 9))
    photo.save(path)
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))


def assert_same(one: Store, other: Store) -> None:
    assert len(one) == len(other)
    assert one.conditions == other.conditions
    for index in range(len(one)):
        a, b = one[index], other[index]
        assert a.captions == b.captions
        assert a.conditions.keys() == b.conditions.keys()
        for x, y in zip([a.latents, *a.conditions.values()], [b.latents, *b.conditions.values()], strict=True):
            assert torch.allclose(x, y, atol=2e-3)  # the last bit may depend on the other images of the batch


def test_store_holds_what_was_encoded(prepared, parts):
    store, codec = Store(prepared / "shards"), LatentCodec(parts.vae)
    assert len(store) == FACES
    assert store.conditions == ["mask", "sketch", "keypoints"]
    for number, row in enumerate(read_folder(prepared / "faces")):
        sample = store[number]
        assert sample.latents.shape == (4, 4, 4)
        assert sample.log_variance is None
        assert list(sample.captions) == list(captions_of(row))
        photo = codec.encode(to_tensor([read_photo(row["file_name"], SIZE)]))[0]
        assert torch.allclose(sample.latents, photo, atol=2e-3)
        for name, condition in CONDITIONS.items():
            drawn = condition.render(condition.read(row[column_of(name)]).raw, SIZE, SIZE)
            assert torch.allclose(sample.conditions[name], codec.encode(to_tensor([drawn]))[0], atol=2e-3)


def test_augmentations_mirror_and_vary(prepared, parts, tmp_path):
    encode_folder(prepared / "faces", tmp_path / "augmented", parts, size=SIZE, augmentations=2)
    store, plain = Store(tmp_path / "augmented"), Store(prepared / "shards")
    assert len(store) == 20
    for number, row in enumerate(read_folder(prepared / "faces")):
        assert list(store[number].captions) == list(captions_of(row))
        assert list(store[number + 10].captions) == [mirrored_caption(caption) for caption in captions_of(row)]
    assert any("right" in caption for number in range(10) for caption in store[number].captions)
    assert torch.allclose(store[3].latents, plain[3].latents, atol=2e-3)
    photo = read_photo(read_folder(prepared / "faces")[3]["file_name"], SIZE)
    mirrored = LatentCodec(parts.vae).encode(to_tensor([photo[:, ::-1]]))[0]
    assert torch.allclose(store[13].latents, mirrored, atol=2e-3)
    mask = CONDITIONS["mask"]
    labels = mask.resize(mask.read(read_folder(prepared / "faces")[3]["mask_file_name"]).raw, SIZE, SIZE)
    exact = LatentCodec(parts.vae).encode(to_tensor([mask.render(mask.flip(labels), SIZE, SIZE)]))[0]
    off = (store[13].conditions["mask"] - exact).abs().mean()
    assert 0.01 < off / exact.std() < 0.7  # varied, but still the mirrored mask of this face


@pytest.mark.parametrize(
    ("caption", "mirrored"),
    [
        ("A light from the left, right eyes closed.", "A light from the right, left eyes closed."),
        ("Left: a hat. RIGHT-handed", "Right: a hat. LEFT-handed"),
        ("bright cheeks, upright, all right", "bright cheeks, upright, all right"),
    ],
)
def test_mirrored_captions_name_the_other_side(caption, mirrored):
    assert mirrored_caption(caption) == mirrored
    assert mirrored_caption(mirrored) == caption


def test_faces_without_a_condition_keep_the_others(faces, parts, tmp_path):
    rows = read_rows(faces)
    del rows[2]["keypoints_file_name"]
    write_rows(faces, rows)
    encode_folder(faces, tmp_path / "s", parts, size=SIZE)
    store = Store(tmp_path / "s")
    assert [set(store[i].conditions) for i in (1, 2)] == [{"mask", "sketch", "keypoints"}, {"mask", "sketch"}]
    data = DataRecipe(shards=("s",), condition_probabilities={"keypoints": 1.0})
    batch = make_batch([store[1], store[2]], [0, 1], data, ["keypoints"], torch.zeros(1), torch.ones(1), seed=0)
    assert batch.condition_index.tolist() == [[0], [-1]]


def test_interrupted_and_run_again(prepared, parts, tmp_path):
    """Interrupted after every written file: nothing is encoded twice; no manifest exists before the end."""
    out, encoded, runs = tmp_path / "shards", 0, 0
    plain = encode_folder(prepared / "faces", tmp_path / "whole", parts, size=SIZE)
    assert plain == {"faces": FACES, "written": 10 * FACES, "truncated": plain["truncated"], "encoded": IMAGES} | (
        dict.fromkeys(("captions", "uncaptioned", "damaged", "removed", "missing"), 0)
    )

    def stop(*_):
        raise KeyboardInterrupt

    while not (out / "manifest.json").is_file():
        with pytest.raises(InputError, match=r"manifest.json is missing"):
            Store(out)
        runs += 1
        assert runs < 10
        try:  # a single batch here, so every file is written before the first report
            found = encode_folder(
                prepared / "faces", out, parts, size=SIZE, process=(runs % 3, 3), shard_bytes=600, progress=stop
            )
        except KeyboardInterrupt:
            continue
        encoded += found["encoded"]
    assert encoded == 0  # the interrupted runs did everything
    assert_same(Store(out), Store(tmp_path / "whole"))
    keys = [key for file in out.glob("latents-*") for key in load_keys(file)]
    assert len(keys) == len(set(keys)) == IMAGES


def test_only_own_files_are_deleted(prepared, faces, parts, tmp_path, capsys):
    """A folder with other files is rejected; files of the user next to a store stay."""
    out, mine = tmp_path / "s", ["notes.txt", "my-style.safetensors", "model-00001-of-00002.safetensors"]
    out.mkdir()
    for name in mine:
        (out / name).write_text("mine")
    command = ("prepare", "encode", faces, out, "--components", prepared / "components", "--size", SIZE)
    assert run(*command) == 2
    assert f"{out} contains model-00001-of-00002.safetensors" in capsys.readouterr().err
    assert sorted(path.name for path in out.iterdir()) == sorted(mine)

    out = Path(shutil.copytree(prepared / "shards", tmp_path / "copy"))
    for name in mine:
        (out / name).write_text("mine")
    write_rows(faces, read_rows(faces)[:4])
    encode_folder(faces, out, parts, size=SIZE, replace=True)
    assert all((out / name).read_text() == "mine" for name in mine)
    assert len(Store(out)) == 4


def test_damaged_and_removed_files_are_reported(prepared, faces, tmp_path, capsys):
    """A flipped bit is found by its hash and encoded again; images that are no longer in the folder are counted."""
    out = Path(shutil.copytree(prepared / "shards", tmp_path / "s"))
    command = ("prepare", "encode", faces, out, "--components", prepared / "components", "--size", SIZE)
    for kind in ("latents", "rows", "places"):
        (file,) = out.glob(f"{kind}-*")
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 0x40
        file.write_bytes(content)
        with pytest.raises(InputError, match=f"{file} is damaged"):
            Store(out).verify()
        assert run(*command) == 0
        assert f"1 files of {out} were damaged and have been encoded again" in capsys.readouterr().err
        Store(out).verify()
    assert_same(Store(out), Store(prepared / "shards"))
    rows = read_rows(faces)
    change_pixel(faces / "train" / rows[0]["file_name"], 5)
    write_rows(faces, rows[:7])
    before = (out / "manifest.json").read_bytes()
    assert run(*command) == 2
    printed = capsys.readouterr().err
    assert f"{out} contains 3 images that {faces / 'train'} does not, such as {rows[7]['file_name']}, " in printed
    assert (out / "manifest.json").read_bytes() == before
    assert run(*command, "--replace") == 0
    assert "3 images of the former shards have been removed" in capsys.readouterr().err
    assert run(*command) == 0


def load_keys(file: Path) -> list[bytes]:

    return [key.numpy().tobytes() for key in load_file(file)["keys"]]


def test_ranks_complete_each_other(faces, prepared, parts, tmp_path):
    """One of three processes, then two others: no entry is written twice."""
    rows = read_rows(faces)
    write_rows(faces, rows * 30)  # several blocks; a repeated face is encoded once
    for number, path in enumerate(sorted((faces / "train/masks").iterdir())):
        change_pixel(path, number)
    out, encoded = tmp_path / "shards", []
    for process in ((1, 3), (0, 2), (1, 2)):
        found = encode_folder(faces, out, parts, size=SIZE, process=process, text_features=True)
        encoded.append((found["encoded"], found["captions"]))
        assert (out / "manifest.json").is_file() == (found["missing"] == 0)
    assert found["missing"] == 0
    captions = {"", *(caption for row in rows for caption in row["text"])}
    assert [sum(column) for column in zip(*encoded, strict=True)] == [IMAGES, len(captions)]
    store = Store(out)
    assert len(store) == 30 * FACES
    assert torch.equal(store[3].latents, store[293].latents)
    assert torch.allclose(store[293].latents, Store(prepared / "shards")[3].latents, atol=2e-3)


def contents(faces: Path) -> set[tuple[str, bytes]]:
    """Every (column, file hash) in a folder: what one augmentation encodes."""
    rows = read_folder(faces)
    columns = ["file_name", *map(column_of, CONDITIONS)]
    return {(name, sha256(row[name].read_bytes()).digest()) for row in rows for name in columns if name in row}


def mutate(faces: Path, kind: str, rng: random.Random, number: int) -> None:
    rows = read_rows(faces)
    row, root = rng.choice(rows), faces / "train"
    if kind in ("file_name", "mask_file_name", "sketch_file_name"):
        if kind in row:
            change_pixel(root / row[kind], number)
    elif kind == "touch":
        os.utime(root / row["file_name"])
    elif kind == "rename":
        old, new = row["file_name"], f"images/renamed_{number}.png"
        (root / old).rename(root / new)
        for each in rows:
            each["file_name"] = new if each["file_name"] == old else each["file_name"]
    elif kind == "shuffle":
        rng.shuffle(rows)
    elif kind == "insert":
        new = f"images/new_{number}.png"
        color = (number * 7 % 256, number % 256, 3)
        Image.new("RGB", (SIZE, SIZE), color).save(root / new)
        rows.insert(rng.randrange(len(rows)), {"file_name": new, "text": f"a new face {number}"})
    elif kind == "duplicate":
        rows.append(dict(row))
    elif kind == "delete" and len(rows) > 5:
        rows.remove(row)
    elif kind == "caption":
        row["text"] = [f"another caption {number}"]
    elif kind == "drop":
        row.pop("sketch_file_name", None)
    elif kind == "share":
        row["sketch_file_name"] = rng.choice([r["sketch_file_name"] for r in rows if "sketch_file_name" in r])
    write_rows(faces, rows)


KINDS = ("file_name", "mask_file_name", "sketch_file_name", "touch", "rename", "shuffle", "insert", "duplicate")
KINDS += ("delete", "caption", "drop", "share")


def test_changes_encode_only_what_is_necessary(faces, parts, tmp_path):
    rng, out = random.Random(0), tmp_path / "shards"
    encode_folder(faces, out, parts, size=SIZE, augmentations=2, shard_bytes=3000)
    assert Store(out).manifest["columns"] == ["image", "mask", "sketch", "keypoints"]
    before = contents(faces)
    for number in range(2 * len(KINDS)):
        mutate(faces, KINDS[number % len(KINDS)], rng, number)
        after = contents(faces)
        found = encode_folder(faces, out, parts, size=SIZE, augmentations=2, shard_bytes=3000, replace=True)
        assert found["encoded"] == 2 * len(after - before), KINDS[number % len(KINDS)]
        assert found["missing"] == 0
        before = after
        if number % 8 == 7:
            shutil.rmtree(tmp_path / "fresh", ignore_errors=True)
            encode_folder(faces, tmp_path / "fresh", parts, size=SIZE, augmentations=2)
            assert_same(Store(out), Store(tmp_path / "fresh"))
    store = Store(out)
    for start, (name, count) in zip([0, *store.latents.ends], store.manifest["latents"], strict=False):
        entries = store.places["pictures"]
        assert ((start <= entries) & (entries < start + count)).any(), name  # unused files are deleted
    assert len(list(out.glob("latents-*"))) == len(store.manifest["latents"])


def test_augmentations_and_conditions_are_added_incrementally(faces, parts, tmp_path):
    rows = read_rows(faces)
    write_rows(faces, [{key: row[key] for key in ("file_name", "mask_file_name", "text")} for row in rows])

    def encode(count: int) -> int:
        return encode_folder(faces, tmp_path / "s", parts, size=SIZE, augmentations=count)["encoded"]

    assert encode(1) == 2 * FACES
    assert Store(tmp_path / "s").conditions == ["mask"]
    write_rows(faces, rows)
    assert encode(1) == 2 * FACES  # sketches and keypoints
    assert encode(3) == 7 * FACES  # mirrored images, conditions twice; images 0 and 2 are equal
    store = Store(tmp_path / "s")
    assert torch.equal(store[4].latents, store[24].latents)
    assert not torch.equal(store[4].conditions["mask"], store[24].conditions["mask"])
    with pytest.raises(InputError, match="has 3 augmentations"):
        encode(2)


def test_training_samples_from_moments(prepared, tmp_path):
    """An autoencoder with a distribution: images are sampled, conditions are the mean."""
    tiny_flux_pipeline().save_pretrained(tmp_path / "flux")
    parts = load_components(tmp_path / "flux")
    found = encode_folder(prepared / "faces", tmp_path / "s", parts, size=SIZE)
    assert found["encoded"] == IMAGES
    store = Store(tmp_path / "s")
    row, sample = read_folder(prepared / "faces")[2], store[2]
    moments = parts.vae.encode(to_tensor([read_photo(row["file_name"], SIZE)])).latent_dist
    assert torch.allclose(sample.latents, moments.mean[0], atol=2e-3)
    assert torch.allclose(sample.log_variance, moments.logvar[0], atol=2e-2)
    mask = CONDITIONS["mask"]
    drawn = to_tensor([mask.render(mask.read(row["mask_file_name"]).raw, SIZE, SIZE)])
    assert torch.allclose(sample.conditions["mask"], parts.vae.encode(drawn).latent_dist.mode()[0], atol=2e-3)

    data, zero, one = DataRecipe(shards=(), condition_probabilities={"mask": 1.0}), torch.zeros(1), torch.ones(1)
    draw = lambda positions: make_batch([sample] * len(positions), positions, data, ["mask"], zero, one, seed=0)  # noqa: E731
    batch = draw(range(2000))
    spread = torch.exp(0.5 * sample.log_variance)
    assert torch.allclose(batch.clean.std(dim=0) / spread, torch.ones(4, 4, 4), atol=0.1)
    assert ((batch.clean.mean(dim=0) - sample.latents).abs() < 0.12 * spread).all()
    assert torch.equal(draw([7, 3]).clean[1], batch.clean[3])
    assert torch.equal(batch.condition_latents[0, 0], sample.conditions["mask"])


def test_text_features_replace_the_text_encoder(faces, parts, tmp_path):
    encode = lambda **options: encode_folder(faces, tmp_path / "s", parts, size=SIZE, shard_bytes=9000, **options)  # noqa: E731
    rows = read_rows(faces)
    captions = {"", *(caption for row in rows for caption in row["text"])}
    assert encode(text_features=True)["captions"] == len(captions)
    rows[0]["text"] = ["a new caption", rows[1]["text"][0]]
    write_rows(faces, rows)
    found = encode()  # text features are always updated
    assert (found["encoded"], found["captions"]) == (0, 1)
    samples = [Store(tmp_path / "s")[index] for index in range(FACES)]
    assert [len(sample.text) for sample in samples] == [len(row["text"]) + 1 for row in rows]
    data = DataRecipe(shards=(), condition_probabilities={"mask": 1.0}, text_dropout=0.3)
    batch = make_batch(samples, range(FACES), data, ["mask"], torch.zeros(1), torch.ones(1), seed=0)
    assert "" in batch.captions
    expected = parts.text_features(batch.captions)
    for stored, fresh in zip(batch.text, expected, strict=True):
        assert torch.allclose(stored, fresh, atol=2e-3, rtol=2e-3)


def test_mirrored_captions_have_text_features(faces, parts, tmp_path):
    rows, out = read_rows(faces), tmp_path / "s"
    for number, row in enumerate(rows):
        row["text"] = [f"face {number}", "turned to the left", "light from the right"][: number % 4]
    write_rows(faces, rows)
    encode_folder(faces, out, parts, size=SIZE, text_features=True)
    assert encode_folder(faces, out, parts, size=SIZE, augmentations=2)["captions"] == 2
    store = Store(out)
    for sample in (store[3], store[FACES + 3]):
        fresh = parts.text_features([*sample.captions, ""])
        for number, stored in enumerate(sample.text):
            assert torch.allclose(stored.tokens.float(), fresh.tokens[number], atol=2e-3, rtol=2e-3)
    assert list(store[FACES + 3].captions) == ["face 3", "turned to the right", "light from the left"]


def test_rejected_input(prepared, faces, parts, tmp_path):
    with pytest.raises(InputError, match="encoded with another size"):
        encode_folder(prepared / "faces", prepared / "shards", parts, size=64)
    with pytest.raises(InputError, match="encoded with another precision"):
        encode_folder(prepared / "faces", prepared / "shards", parts, size=SIZE, precision="bf16")
    assert encode_folder(prepared / "faces", prepared / "shards", parts, size=SIZE, precision="auto")["encoded"] == 0
    with pytest.raises(InputError, match=r"must be a multiple of 8\. Nearest: 32"):
        encode_folder(prepared / "faces", tmp_path / "s", parts, size=SIZE + 1)
    (faces / "train/masks/000004.png").write_bytes(b"")
    with pytest.raises(InputError, match=r"000004.png is empty"):
        encode_folder(faces, tmp_path / "s", parts, size=SIZE)
    (faces / "train/masks/000004.png").unlink()
    with pytest.raises(InputError, match=r"000004.png cannot be read"):
        encode_folder(faces, tmp_path / "s", parts, size=SIZE)
    old = tmp_path / "old"
    old.mkdir()
    (old / "manifest.json").write_text(json.dumps({"schema": 1, "conditions": [], "shards": []}))
    for use in (lambda: Store(old), lambda: encode_folder(faces, old, parts, size=SIZE)):
        with pytest.raises(InputError, match="another version"):
            use()


def test_damaged_files_are_reported_and_rewritten(prepared, parts, tmp_path):
    out = tmp_path / "s"
    encode = lambda: encode_folder(prepared / "faces", out, parts, size=SIZE, shard_bytes=3000)["encoded"]  # noqa: E731
    encode()
    for kind, lost in (("latents", None), ("rows", 0), ("places", 0)):
        file = sorted(out.glob(f"{kind}-*"))[0]
        lost = len(load_keys(file)) if lost is None else lost
        file.write_bytes(file.read_bytes()[:100])
        with pytest.raises(InputError, match=f"{file.name} cannot be read"):
            Store(out)
        assert encode() == lost
        assert_same(Store(out), Store(prepared / "shards"))
    (out / ".latents-0123.safetensors.4567.partial").write_bytes(b"half")
    assert encode() == 0
    assert_same(Store(out), Store(prepared / "shards"))


def test_command(prepared, parts, tmp_path, capsys):
    out = tmp_path / "s"
    arguments = [str(prepared / "faces"), str(out), "--components", str(prepared / "components"), "--size", str(SIZE)]
    cli.main(["prepare", "encode", *arguments])
    assert f"{FACES} faces, {IMAGES} images and conditions encoded now\n" in capsys.readouterr().out
    assert run("prepare", "encode", *arguments, "--device", "nowhere") == 2
    assert "Device 'nowhere' is not available" in capsys.readouterr().err
    cli.main(["prepare", "encode", *arguments, "--augmentations", "2"])
    printed = capsys.readouterr()
    assert f"{FACES} faces x 2 augmentations, {IMAGES} images and conditions encoded now\n" in printed.out
    limit = parts.settings["max_text_tokens"]
    captions = [caption for row in read_rows(prepared / "faces") for caption in row["text"]]
    long = sum(truncated_text(parts.tokenizer, caption, limit) != "" for caption in captions)
    assert 0 < long < len(captions)
    assert printed.err.startswith(f"{long} of {len(captions)} captions are longer than {limit} tokens, the most")


def test_a_condition_of_another_aspect_ratio_is_named(prepared, faces, parts, tmp_path):
    mask = faces / "train" / "masks" / "000003.png"
    Image.open(mask).resize((SIZE, 2 * SIZE)).save(mask)
    with pytest.raises(InputError, match=rf"{mask}: the mask is {SIZE}x{2 * SIZE}, but the image is {SIZE}x{SIZE}"):
        encode_folder(faces, tmp_path / "s", parts, size=SIZE)


def test_faces_without_captions(prepared, faces, tmp_path, capsys):
    rows = read_rows(faces)
    for row in rows[:3]:
        del row["text"]
    write_rows(faces, rows)
    assert run("prepare", "encode", faces, tmp_path / "s", "--components", prepared / "components", "--size", SIZE) == 0
    assert f"3 of {FACES} faces have no captions: they are trained with empty text" in capsys.readouterr().err
    assert Store(tmp_path / "s").uncaptioned() == 3


def test_images_to_shards_in_one_command(prepared, tmp_path, capsys):
    sample_datasets.celeba(tmp_path / "source")
    arguments = [tmp_path / "source", tmp_path / "out", "--size", SIZE, "--held-out", 4]
    command = ["prepare", "shards", *arguments, "--components", prepared / "components"]
    assert run(*command) == 0
    printed = capsys.readouterr()
    assert [line.split(":")[0] for line in printed.err.splitlines() if line.endswith("of processor time")] == [
        "ingesting", "annotating", "checking", "encoding test", "encoding train",
    ]  # fmt: skip
    store = Store(tmp_path / "out" / "shards")
    assert (len(store), store.conditions) == (8, ["mask", "sketch"])
    assert len(store[0].captions) == 10
    assert all({"mask_file_name", "sketch_file_name"} <= row.keys() for row in read_folder(tmp_path / "out/faces/test"))
    assert run(*command) == 0
    assert "8 faces, 0 images and conditions encoded now" in capsys.readouterr().out
    assert len(Store(tmp_path / "out" / "test_shards")) == 4


def test_photographs_without_captions(tmp_path, capsys):
    """Captions come from predicted attributes; a second run adds none."""
    for index in range(3):
        sample_datasets.put(tmp_path / "source", f"{index}.png", sample_datasets.image(index))
    command = ["prepare", "shards", tmp_path / "source", tmp_path / "out", "--held-out", 1, "--size", 64]
    assert run(*command) == 0
    assert "captioning: " in capsys.readouterr().err
    rows = [*read_folder(tmp_path / "out/faces/train"), *read_folder(tmp_path / "out/faces/test")]
    assert all(len(row["text"]) == 10 for row in rows)
    assert Store(tmp_path / "out" / "shards").uncaptioned() == 0
    assert run(*command) == 0
    assert "captioning: " not in capsys.readouterr().err
    folder = tmp_path / "out" / "faces"
    assert run("prepare", "caption", folder, "--grammar", "--attributes", "bundled") == 0
    assert "3 faces, 30 captions" in capsys.readouterr().out


def test_only_faces_without_captions_are_captioned(prepared, tmp_path):
    """One face without captions among others with attributes: the own captions are not diluted."""
    source, out = tmp_path / "source", tmp_path / "out"
    rows = [{"file_name": f"{n}.png", "attributes": {"Smiling": True}, "text": [f"own {n}"]} for n in range(4)]
    del rows[2]["text"]
    for number, row in enumerate(rows):
        sample_datasets.put(source, row["file_name"], sample_datasets.image(number))
    sample_datasets.put(source, "metadata.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["prepare", "shards", source, out, "--size", SIZE, "--components", prepared / "components"]
    assert run(*arguments, "--parser", "none") == 0
    texts = [captions_of(row) for row in read_folder(out / "faces")]
    assert [len(text) for text in texts] == [1, 1, 10, 1]
    assert texts[3] == ("own 3",)


def test_only_train_is_encoded_and_reported(prepared, faces, tmp_path, capsys):
    shutil.copytree(faces / "train", faces / "test")
    arguments = (faces, tmp_path / "s", "--components", prepared / "components", "--size", SIZE)
    assert run("prepare", "encode", *arguments) == 0
    printed = capsys.readouterr()
    assert "only train is encoded, not test" in printed.err
    assert f"{FACES} faces" in printed.out


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--size", 100, "size 100 is not supported: it must be a multiple of 8. Nearest: 96"),
        ("--size", 0, "size 0 is not supported"),
        ("--size", -8, "size -8 is not supported"),
        ("--augmentations", 0, "augmentations must be at least 1, not 0"),
    ],
)
@pytest.mark.parametrize("command", ["encode", "shards"])
def test_invalid_sizes(prepared, tmp_path, command, option, value, message, capsys):
    arguments = [prepared / "faces", tmp_path / "out", "--components", prepared / "components"]
    assert run("prepare", command, *arguments, option, value) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("wrong", ["components", "landmarker", "split"])
def test_invalid_arguments_are_reported_before_the_work(prepared, tmp_path, wrong, capsys):
    source, out = tmp_path / "source", tmp_path / "out"
    sample_datasets.put(source, "test/0.png" if wrong == "split" else "0.png", sample_datasets.image(0))
    options = {"components": prepared / "components"} | ({} if wrong == "split" else {wrong: tmp_path / "none"})
    arguments = [word for name, value in options.items() for word in (f"--{name}", value)]
    assert run("prepare", "shards", source, out, *arguments) == 2
    assert ("has test but no split train" if wrong == "split" else f"{tmp_path / 'none'}") in capsys.readouterr().err
    assert not list(out.rglob("sketches"))
    assert out.exists() == (wrong == "split")
