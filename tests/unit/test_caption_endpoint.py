"""Captions from an endpoint: a local server that answers, fails, rejects, hangs and disappears."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import signal
import threading
import time
from email.utils import formatdate
from pathlib import Path

import pytest
from chat_server import DROP, HANG, chat_server, failed, reply_with
from drawn import drawn_mask
from hostile import full_disk
from PIL import Image

from builders import run
from likeness.chat import Answer, Meter, retry_after
from likeness.conditions.mask import mask_image
from likeness.data.synthetic import draw_face
from likeness.prepare.caption.folder import CaptionSettings, caption_folder
from likeness.prepare.caption.models import Question, load_counter, open_model
from likeness.prepare.caption.prompts import PROMPTS, describe
from likeness.prepare.caption.records import open_answers
from likeness.types import InputError

DATED = "dated"

LOOKS = ("red", "green", "black", "grey", "brown", "white", "golden", "silver", "dark", "fair")


def caption_for(text: str) -> str:
    """A good caption that depends on the prompt."""
    number = next((n for n, name in enumerate(PROMPTS) if PROMPTS[name] in text), 0)
    return f"A woman with {LOOKS[number]} hair and a smile on her lips."


def answering(text, image, number):
    return reply_with(caption_for(text))


@pytest.fixture(scope="module")
def count():
    return load_counter()


@pytest.fixture
def folder(tmp_path) -> Path:
    """Four faces; the first has a mask and CelebA's attributes, the second a caption."""
    root = tmp_path / "faces"
    (root / "images").mkdir(parents=True)
    rows = []
    for index in range(4):
        Image.fromarray(draw_face(0, index, 64).image).save(root / "images" / f"{index}.png")
        rows.append({"file_name": f"images/{index}.png", "identity": index})
    mask_image(drawn_mask()).save(root / "mask.png")
    rows[0] |= {"mask_file_name": "mask.png", "attributes": {"Male": False, "Smiling": True}}
    rows[1]["text"] = "my own caption"
    (root / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def texts(folder: Path) -> list:
    return [json.loads(line).get("text") for line in (folder / "metadata.jsonl").read_text().splitlines()]


def record(folder: Path) -> list[list[dict]]:
    return [json.loads(line)["captions"] for line in (folder / "captions.jsonl").read_text().splitlines()]


def caption(folder: Path, *options: str, code: int = 0) -> None:
    """Run the command and check its exit code."""
    assert run("prepare", "caption", folder, *options) == code


def test_ten_captions_per_face_with_origin(folder, capsys):
    with chat_server(answering) as server:
        caption(folder, "--vlm", server.address)
        assert len(server.requests) == 40
        assert {body["model"] for body in server.requests} == {"tiny-vlm"}
        assert all(body["temperature"] == 0 for body in server.requests)
        assert server.requests[0]["authorization"] is None
        before = (folder / "metadata.jsonl").read_bytes(), (folder / "captions.jsonl").read_bytes()
        caption(folder, "--vlm", server.address)  # a second run sends nothing and changes nothing
        assert len(server.requests) == 40
    assert before == ((folder / "metadata.jsonl").read_bytes(), (folder / "captions.jsonl").read_bytes())
    wanted = [caption_for(describe(name)) for name in PROMPTS]
    assert texts(folder) == [wanted, ["my own caption", *wanted], wanted, wanted]
    own, natural = record(folder)[1][:2]
    assert own == {"text": "my own caption", "source": "given"}
    assert natural["prompt"] == "natural"
    assert natural["model"] == "tiny-vlm"
    assert natural["raw"] == natural["text"] == wanted[0]
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    assert rows[0]["mask_file_name"] == "mask.png"
    assert rows[3]["identity"] == 3
    assert "4 faces, 41 captions; 40 requests, 4000 tokens" in capsys.readouterr().out


def test_all_splits_of_a_folder(folder, tmp_path, capsys):
    for split in ("train", "test"):
        shutil.copytree(folder, tmp_path / "splits" / split)
    (tmp_path / "splits/test/images/3.png").write_bytes(b"broken")
    with chat_server(answering) as server:
        caption(tmp_path / "splits", "--vlm", server.address, "--prompts", "brief", code=1)
    assert [len(found or ()) for found in texts(tmp_path / "splits/train")] == [1, 2, 1, 1]
    assert [len(found or ()) for found in texts(tmp_path / "splits/test")] == [1, 2, 1, 0]
    printed = capsys.readouterr()
    assert "8 faces, 9 captions" in printed.out
    assert "test/images/3.png: " in printed.err


def test_image_is_upright_and_bounded(folder):
    sizes = []

    def look(text, image, number):
        sizes.append(image.size)
        return reply_with(caption_for(text))

    turned = Image.new("RGB", (90, 60), "red")
    turned.save(folder / "images" / "0.png", exif=exif_turned())
    with chat_server(look) as server:
        caption(folder, "--vlm", server.address, "--prompts", "brief", "--pixels", "40", "--parallel", "1")
    assert sizes == [(27, 40), (40, 40), (40, 40), (40, 40)]


def exif_turned() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees
    return exif


def test_only_changes_are_sent_again(folder):
    with chat_server(answering) as server:
        caption(folder, "--vlm", server.address)
        Image.fromarray(draw_face(0, 9, 64).image).save(folder / "images" / "2.png")
        server.requests.clear()
        caption(folder, "--vlm", server.address)
        assert len(server.requests) == 10
        server.requests.clear()
        caption(folder, "--vlm", server.address, "--max-tokens", "12")  # shortening sends nothing
        assert server.requests == []
        assert all(c["touched"][-1][0] == "length" for c in record(folder)[2])
        caption(folder, "--vlm", server.address, "--vlm-fields", '{"temperature": null, "top_k": 1}')
        assert len(server.requests) == 40
        assert "temperature" not in server.requests[0]
        assert server.requests[0]["top_k"] == 1


def test_bad_answers_are_dropped_with_the_reason(folder, capsys):
    def reply(text, image, number):
        if PROMPTS["hair"] in text:
            return reply_with("I'm sorry, but I can't help with that.")
        if PROMPTS["age"] in text:
            return reply_with("The image shows a woman with a smile. Her hair is long and", "length")
        if PROMPTS["light"] in text:
            return reply_with(None)
        return reply_with("A bald woman in soft light.") if PROMPTS["face"] in text else reply_with(caption_for(text))

    with chat_server(reply) as server:
        caption(folder, "--vlm", server.address)
    by_prompt = {c["prompt"]: c for c in record(folder)[0]}
    assert by_prompt["hair"]["dropped"] == "refusal"
    assert by_prompt["hair"]["raw"].startswith("I'm sorry")
    assert by_prompt["light"]["touched"] == [["empty", "no text"]]
    assert by_prompt["age"]["text"] == "A woman with a smile."
    assert [kind for kind, _ in by_prompt["age"]["touched"]] == ["picture", "truncated"]
    assert by_prompt["face"]["dropped"] == "mask"
    assert "A bald woman in soft light." in texts(folder)[2]  # no mask to contradict it
    assert "dropped: 4 refusal, 4 empty, 1 mask" in capsys.readouterr().out


def test_refiner_gets_the_facts_and_is_checked(folder):
    def reply(text, image, number):
        if image is not None:
            return reply_with("A smiling woman with red hair, wearing glasses.")
        assert "Caption: A smiling woman with red hair, wearing glasses." in text
        if "Not in the picture: glasses" in text:
            assert "It holds: smiling." in text
            assert 'Contradiction: the caption says "glasses", but the mask has no eye_g' in text
            return reply_with("<think>No glasses there.</think>A smiling woman with red hair.")
        return reply_with("A smiling woman with red hair, wearing glasses and a crown.")  # adds a claim

    with chat_server(reply, ("vlm", "llm")) as server:
        # sequentially, so that equal questions of two faces are sent once
        options = ["--vlm", server.address, "--vlm-name", "vlm", "--prompts", "natural", "--parallel", "1"]
        caption(folder, *options, "--refiner", server.address, "--refiner-name", "llm", "--replace")
        assert [body["model"] for body in server.requests].count("llm") == 2
        caption(folder, *options, "--refiner", server.address, "--refiner-name", "llm", "--replace")
        assert len(server.requests) == 6
    (first,), (given, second) = record(folder)[:2]
    assert first["text"] == "A smiling woman with red hair."
    assert first["refiner"] == "llm"
    assert first["refined"].startswith("<think>")
    assert first["touched"] == [["refined", "8 to 6 words"]]
    assert second["touched"][-1] == ["refined", 'the answer adds "crown"']
    assert given["dropped"] == "replaced"
    assert texts(folder) == [["A smiling woman with red hair."], None, None, None]  # empty lists would be faults


def test_temporary_errors_are_retried(folder, count):
    stumbles = {
        0: failed(500, "worker died"),
        1: failed(429, "slow down", Retry_After="0.3"),
        2: (200, {}, b"{not json"),
        3: (200, {}, b'{"choices": []}'),
        4: DROP,
        5: DATED,
        6: HANG,
    }

    def reply(text, image, number):
        if stumbles.get(number) == DATED:
            return failed(429, "slow down", Retry_After=formatdate(time.time() + 2, usegmt=True))
        return stumbles.get(number) or answering(text, image, number)

    with chat_server(reply) as server:
        meter = Meter(first_wait=0.01, timeout=3, tries=8)
        settings = CaptionSettings(vlm=open_model(server.address, vision=True, meter=meter), prompts=("brief",))
        report = caption_folder(folder, settings, count, meter=meter, parallel=1)
        at = [body["at"] for body in server.requests]
    assert report.used == 5
    assert not report.failed
    assert meter.requests == len(at) == 4 + len(stumbles)
    assert at[2] - at[1] >= 0.3  # as requested by the server
    assert at[6] - at[5] >= 0.9  # a date has a resolution of one second


def test_impossible_dates():
    assert retry_after("Mon, 01 Jan 2030 00:00:00 +99999999999999999") == 0
    assert retry_after("Mon, 01 Jan 2001 00:00:00 GMT") == 0
    assert retry_after("tomorrow") == 0


def test_waits_double(folder, count):
    with chat_server(lambda *_: failed(503, "overloaded")) as server:
        meter = Meter(first_wait=0.05, tries=5)
        settings = CaptionSettings(vlm=open_model(server.address, vision=True, meter=meter, name="m"))
        with pytest.raises(InputError, match=r"does not respond: 503 .*: overloaded, 5 attempts in"):
            caption_folder(folder, settings, count, meter=meter, parallel=1)
        at = [body["at"] for body in server.requests]
    waits = [after - before for before, after in itertools.pairwise(at)]
    assert len(waits) == 4
    assert all(wait >= 0.05 * 2**n * 0.75 for n, wait in enumerate(waits))


def test_answers_are_kept_if_the_server_disappears(folder, capsys):
    with chat_server(lambda t, p, n: answering(t, p, n) if n < 17 else DROP) as server:
        caption(folder, "--vlm", server.address, "--tries", "1", "--parallel", "1", code=2)
        address = server.address
    error = capsys.readouterr().err
    assert "does not respond" in error
    assert "the 17 answers of this run are stored in" in error
    assert texts(folder)[0] is None  # nothing partial
    assert not (folder / "captions.jsonl").exists()
    caption(folder, "--vlm", address, "--vlm-name", "tiny-vlm", "--tries", "1", code=2)
    assert "refused" in capsys.readouterr().err.lower()
    with chat_server(answering) as server:
        caption(folder, "--vlm", server.address)
        assert len(server.requests) == 23


def test_permanent_errors_are_reported(folder, monkeypatch, capsys):
    for status, message in ((401, "bad key"), (404, "no such model"), (400, "images are not supported")):
        with chat_server(lambda *_, s=status, m=message: failed(s, m)) as server:
            caption(folder, "--vlm", server.address, "--parallel", "1", code=2)
            assert len(server.requests) == (3 if status == 400 else 1)
        assert message in capsys.readouterr().err
    with chat_server(answering, ("a", 1, "b")) as server:  # an id that is no text is ignored
        caption(folder, "--vlm", server.address, code=2)
        assert "serves a, b: choose a model with --vlm-name" in capsys.readouterr().err
        caption(folder, "--vlm", server.address, "--vlm-key-variable", "sk-secret", code=2)
        printed = capsys.readouterr().err
        assert "give its name, not the key, to --vlm-key-variable" in printed
        assert "sk-secret" not in printed
        monkeypatch.setenv("MY_KEY", "secret")
        caption(folder, "--vlm", server.address, "--vlm-key-variable", "MY_KEY", "--vlm-name", "a")
        assert server.requests[0]["authorization"] == "Bearer secret"
    assert "secret" not in "".join(p.read_text() for p in folder.glob("*.jsonl"))
    with chat_server(lambda *_: (302, {"Location": "http://127.0.0.1:9/v1"}, b"")) as server:
        caption(folder, "--vlm", server.address, "--vlm-name", "c", code=2)
        assert "302" in capsys.readouterr().err
    with chat_server(lambda *_: failed(429, "quota", Retry_After="86400")) as server:
        caption(folder, "--vlm", server.address, "--vlm-name", "c", code=2)
        assert "requests a wait of 86400 s" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--grammar", "--refiner-name", "x"), "--refiner-name has no effect without --refiner"),
        (("--grammar", "--vlm-key-variable", "x"), "--vlm-key-variable has no effect without --vlm"),
        (("--vlm", "a/b", "--vlm-key-variable", "x"), "a/b is a checkpoint"),
        (("--grammar", "--timeout", "inf"), "timeout must be from 0.001 to 1000000, not inf"),
        (("--grammar", "--requests-per-minute", "1e-9"), "requests per minute must be from 0.001"),
    ],
)
def test_options_without_effect(folder, capsys, options, message):
    caption(folder, *options, code=2)
    assert message in capsys.readouterr().err


def test_rejected_image_does_not_stop_the_run(folder, capsys):
    def reply(text, image, number):
        return failed(400, "content filter") if image.size == (32, 32) else answering(text, image, number)

    Image.new("RGB", (32, 32)).save(folder / "images" / "1.png")
    (folder / "images" / "2.png").write_bytes(b"broken")
    with chat_server(reply) as server:
        caption(folder, "--vlm", server.address, "--parallel", "1", code=1)
        assert [len(captions or ()) for captions in texts(folder)] == [10, 1, 0, 10]
        error = capsys.readouterr().err
        assert "images/1.png: 400 Bad Request: content filter" in error
        assert "images/2.png is not a readable image" in error
        server.reply = answering
        caption(folder, "--vlm", server.address, code=1)
        assert len(texts(folder)[1]) == 11


def test_budget_and_pace(folder, count, capsys):
    with chat_server(answering) as server:
        caption(folder, "--vlm", server.address, "--budget", "13", "--parallel", "1", code=1)
        assert len(server.requests) == 13
        assert "the budget is spent: 3 faces lack captions" in capsys.readouterr().err
        assert [len(found or ()) for found in texts(folder)] == [10, 4, 0, 0]
        caption(folder, "--vlm", server.address, "--budget", "500tokens", "--parallel", "1", code=1)
        assert len(server.requests) == 18  # 100 tokens each
        caption(folder, "--vlm", server.address, "--budget", "1,000")
        assert len(server.requests) == 40
        caption(folder, "--vlm", server.address, "--budget", "lots", code=2)
        server.requests.clear()
        meter = Meter(requests_per_minute=600)
        settings = CaptionSettings(
            vlm=open_model(server.address, vision=True, meter=meter, fields='{"seed": 1}'), prompts=("brief", "hair")
        )
        started = time.monotonic()
        caption_folder(folder, settings, count, meter=meter)
        assert time.monotonic() - started >= 7 * 0.1  # 8 requests: at least 7 intervals
    with chat_server(lambda *_: reply_with("A woman with red hair.", tokens=None)) as server:
        caption(folder, "--vlm", server.address, "--vlm-name", "d", "--budget", "9tokens", code=2)
        assert "give the budget in requests" in capsys.readouterr().err


def test_several_at_the_same_time(folder, count):
    for parallel in (1, 4):
        met = threading.Barrier(2, timeout=60)

        def reply(text, image, number, met=met, parallel=parallel):
            if parallel > 1 and number < 2:
                met.wait()  # the first two requests are answered only once both have arrived
            return answering(text, image, number)

        with chat_server(reply) as server:
            (folder / "answers.jsonl").unlink(missing_ok=True)
            caption(folder, "--vlm", server.address, "--prompts", "natural", "brief", "--parallel", str(parallel))
            assert server.most_running <= parallel
            assert (server.most_running > 1) == (parallel > 1)


def test_killed_run_repeats_no_question(folder):
    """SIGKILL while answers come in; the next run sends only the questions without a stored answer."""

    def slow(text, image, number):
        time.sleep(0.02)
        return answering(text, image, number)

    journal = folder / "answers.jsonl"
    with chat_server(slow) as server:
        for kill, wanted in enumerate((1, 4, 9, 11, 17, 22), start=1):
            child = os.fork()
            if not child:
                with contextlib.suppress(BaseException):
                    caption(folder, "--vlm", server.address, "--parallel", "2")
                os._exit(0)
            deadline = time.monotonic() + 60
            while len(server.requests) < wanted:
                assert time.monotonic() < deadline
                assert os.waitpid(child, os.WNOHANG) == (0, 0)
                time.sleep(0.001)
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            while server.running:
                assert time.monotonic() < deadline
                time.sleep(0.001)
            answers = journal.read_bytes().count(b"\n")
            assert answers <= len(server.requests) <= answers + 2 * kill  # lost: what two threads were waiting for
            assert texts(folder)[0] is None
        with journal.open("ab") as file:
            file.write(journal.read_bytes()[:50])  # torn
        before = len(server.requests)
        caption(folder, "--vlm", server.address)
        assert len(server.requests) - before == 40 - answers
    lines = journal.read_bytes().splitlines()
    assert len({json.loads(line)["key"] for line in lines}) == len(lines) == 40
    assert [len(found) for found in texts(folder)] == [10, 11, 10, 10]


def test_journal(tmp_path):
    path = tmp_path / "answers.jsonl"
    with open_answers(path) as cache:
        cache.add("a" * 32, Answer("é\n2", False), prompt="x")
        assert cache.find("a" * 32) == Answer("é\n2", False)
        assert cache.find("a" * 16 + "b" * 16) is None
    with open_answers(path) as cache:
        cache.add("0" * 32, Answer("zero"))
        assert cache.find("a" * 32) == Answer("é\n2", False)
        assert cache.find("f" * 32) is None
    path.write_text(path.read_text() + "hello\n")
    with pytest.raises(InputError, match="line 3 is not an answer"), open_answers(path):
        pass
    with pytest.raises(InputError, match="cannot write"), open_answers(Path("/dev/null/answers.jsonl")):
        pass


def test_full_disk_keeps_complete_lines(tmp_path):
    path = tmp_path / "answers.jsonl"
    with open_answers(path) as cache:
        cache.add("a" * 32, Answer("one"))
        before = path.read_bytes()
        with full_disk(len(before) + 20), pytest.raises(InputError, match=r"cannot write .*answers\.jsonl"):
            cache.add("b" * 32, Answer("two"))
        assert path.read_bytes() == before
        cache.add("b" * 32, Answer("two"))
    with open_answers(path) as cache:
        assert [cache.find(letter * 32) for letter in "ab"] == [Answer("one"), Answer("two")]


def test_grammar_offline(folder, capsys):
    caption(folder, "--grammar", code=1)  # the other three have no attributes of CelebA
    assert "3.png: it has no attributes of CelebA" in capsys.readouterr().err
    first = texts(folder)
    assert len(first[0]) == 10
    assert first[1:] == [["my own caption"], None, None]
    assert not any("man" in text.split() for text in first[0])
    caption(folder, "--grammar", code=1)
    assert texts(folder) == first
    caption(folder, "--grammar", "--seed", "1", code=1)
    assert texts(folder)[0] != first[0]
    with chat_server(answering) as server:
        caption(folder, "--vlm", server.address, "--prompts", "brief")
    assert len(texts(folder)[0]) == 11


def test_rejected_options(folder, capsys):
    for options, wanted in (
        ([], "no source of captions"),
        (["--grammar", "--prompts", "poem"], "unknown prompt 'poem'"),
        (["--grammar", "--prompts", "hair", "hair"], "prompt 'hair' is given twice"),
        (["--grammar", "--refiner", "http://localhost:1/v1", "--refiner-name", "x"], "give --vlm as well"),
        (["--vlm", "http://user:pass@localhost/v1"], "must be plain"),
        (["--vlm", "http://:pass@localhost/v1"], "must be plain"),
        (["--vlm", "http://localhost/v1?key=pass@"], "must be plain"),
        (["--vlm", "http://localhost:1/v1", "--vlm-name", "m", "--vlm-fields", "["], "are not JSON"),
        (["--vlm", "some/checkpoint", "--vlm-name", "m"], "is a checkpoint"),
        (["--grammar", "--max-tokens", "2"], "max tokens must be at least 8"),
        (["--grammar", "--components", "nowhere"], "has no tokenizer"),
    ):
        caption(folder, *options, code=2)
        error = capsys.readouterr().err
        assert wanted in error
        assert "pass@" not in error
    (folder / "captions.jsonl").write_text("{}\n")
    caption(folder, "--grammar", code=2)
    assert "line 1 is not a record" in capsys.readouterr().err


@pytest.mark.parametrize("key", ["sk-1234\nX-Injected: 1", "sk-1234\u2019", "sk-1234 5"])
def test_keys_that_are_no_header(folder, monkeypatch, capsys, key):
    monkeypatch.setenv("LIKENESS_API_KEY", key)
    with chat_server(answering) as server:
        caption(folder, "--vlm", server.address, code=2)
    error = capsys.readouterr().err
    assert "the key in the environment variable LIKENESS_API_KEY contains" in error
    assert "1234" not in error
    assert server.requests == []


def test_keys_are_stripped_and_not_printed(folder, monkeypatch, capsys):
    """Also if the server repeats them, or sends the client to another one."""
    monkeypatch.setenv("LIKENESS_API_KEY", " sk-1234\r\n")
    with chat_server(answering) as other, chat_server(lambda *_: failed(401, "no key sk-1234")) as server:
        caption(folder, "--vlm", server.address, code=2)
        assert {request["authorization"] for request in server.requests} == {"Bearer sk-1234"}
        error = capsys.readouterr().err
        server.reply = lambda *_: failed(307, "there", Location=f"{other.address}/chat/completions")
        caption(folder, "--vlm", server.address, code=2)
        assert other.requests == []
    assert "no key [key]" in error
    assert "1234" not in error + capsys.readouterr().err


def test_default_path_is_v1():
    with chat_server(answering) as server:
        for address in (
            server.address,
            server.address[:-3],
            server.address + "/chat/completions",
            server.address + "/",
        ):
            model = open_model(address, vision=True)
            (answer,) = model.answer([Question("who?")])
            assert answer.finished
            assert model.name == "tiny-vlm"
