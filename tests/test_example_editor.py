import asyncio
import importlib.util
import threading
from pathlib import Path

import pytest
import tiny
from prompt_toolkit.application import create_app_session
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput

from sdgm_edge.runtime import Generator, encode_json

PATIENCE = 30.0
"""Seconds after which a test gives up; nothing is asserted of time."""


@pytest.fixture(scope="module")
def editor():
    path = Path(__file__).parents[1] / "examples" / "editor.py"
    spec = importlib.util.spec_from_file_location("editor", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def gen(tmp_path_factory):
    generation = encode_json({"begin_token": 0, "end_tokens": [], "sampling": {}})
    path = tiny.write(tmp_path_factory.mktemp("bundle") / "tiny", {"generation_config": generation})
    return Generator.load(path, providers="cpu")


def fresh(editor, gen, text):
    return editor.Suggester(gen).suggest(text)


def test_a_suggestion_is_what_the_model_says_next(editor, gen):
    text = "Once upon a ti"
    expected = gen.generate(text, heal=True, temperature=0, max_new_tokens=editor.TOKENS, stop="\n").text
    assert expected
    assert fresh(editor, gen, text) == expected
    assert fresh(editor, gen, "") == ""


def test_it_does_not_depend_on_how_the_text_was_typed(editor, gen):
    suggester = editor.Suggester(gen)
    typed = "Once upon a time there was a bell.\n\nThe river"
    changes = [typed[:i] for i in range(1, len(typed) + 1)]  # letter by letter
    changes += [typed[:-i] for i in range(1, 30)]  # and back
    changes += ["Once upon the bell", "Once", "Twice upon", typed, typed + " ", typed + "\n", "", typed[:20]]
    for text in changes:
        assert suggester.suggest(text) == fresh(editor, gen, text), repr(text)


def test_going_back_rewinds_and_reads_nothing_again(editor, gen, monkeypatch):
    suggester, text = editor.Suggester(gen), "Once upon a time there was a bell that rang like"
    for count in range(1, len(text) + 1):
        suggester.suggest(text[:count])
    session, fed = suggester._session, []
    monkeypatch.setattr(session, "feed", lambda piece: fed.append(piece))
    suggester.suggest("Once upon a time th")
    assert suggester._session is session
    assert fed == []
    assert session.tokens == gen.encode("Once upon a time")


def test_further_back_than_the_history_it_reads_again(editor, gen):
    suggester, text = editor.Suggester(gen), "the bell rang, " * 200
    assert suggester.suggest(text) == fresh(editor, gen, text)
    before = suggester._session
    for changed in (text[:40], text):
        assert suggester.suggest(changed) == fresh(editor, gen, changed)
    assert suggester._session is not before


def test_a_key_cancels_what_is_being_suggested(editor, gen):
    asked = []

    def cancel():
        asked.append(True)
        return len(asked) > 3

    suggester = editor.Suggester(gen)
    cut = suggester.suggest("Once upon a time", cancel)
    assert len(asked) == 4
    whole = suggester.suggest("Once upon a time")
    assert whole.startswith(cut)
    assert len(cut) < len(whole)


def edit(editor, gen, path, scenario):
    """Run the application without a terminal, and `scenario` as the person in front of it."""

    async def until(condition):
        async with asyncio.timeout(PATIENCE):
            while not condition():
                await asyncio.sleep(0.005)

    async def main():
        with (
            create_pipe_input() as keys,
            create_app_session(input=keys, output=DummyOutput()),
            editor.Editor(path, gen) as app,
        ):
            running = asyncio.create_task(app.application.run_async())
            try:
                await scenario(app, keys, until)
            finally:
                keys.send_text("\x11")
                await running
        return app

    app = asyncio.run(main())
    assert not [t for t in threading.enumerate() if t.name == "suggestions"]
    return app


def suggested(app):
    return app.buffer.suggestion.text if app.buffer.suggestion else None


def test_typing_shows_tab_takes_and_saving_writes(editor, gen, tmp_path):
    path = tmp_path / "notes.txt"

    async def scenario(app, keys, until):
        keys.send_text("Once upon a ti")
        expected = fresh(editor, gen, "Once upon a ti")
        await until(lambda: suggested(app) == expected)
        keys.send_text("\t")
        await until(lambda: app.buffer.text == "Once upon a ti" + expected)
        await until(lambda: suggested(app) == fresh(editor, gen, app.buffer.text))
        keys.send_text("\x7f")  # backspace
        await until(lambda: app.buffer.text == ("Once upon a ti" + expected)[:-1])
        await until(lambda: suggested(app) == fresh(editor, gen, app.buffer.text))
        keys.send_text("\x13")
        await until(path.exists)

    app = edit(editor, gen, path, scenario)
    assert path.read_text("utf-8") == app.buffer.text


def test_a_file_is_gone_on_with_and_words_are_taken_one_by_one(editor, gen, tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("Once upon a time there was", "utf-8")

    async def scenario(app, keys, until):
        assert app.buffer.text == "Once upon a time there was"
        keys.send_text(" ")
        text = "Once upon a time there was "
        await until(lambda: suggested(app) == fresh(editor, gen, text))
        word = fresh(editor, gen, text).split()[0]
        keys.send_text("\x1b[1;5C")  # Ctrl-Right
        await until(lambda: app.buffer.text.strip() == (text + word).strip())

    edit(editor, gen, path, scenario)


def test_line_ends_stay_and_what_cannot_be_saved_is_told(editor, gen, tmp_path):
    path = tmp_path / "notes.txt"
    path.write_bytes(b"one\r\ntwo\r\n")

    async def scenario(app, keys, until):
        keys.send_text("abc\x13")
        await until(lambda: path.read_bytes() == b"one\r\ntwo\r\nabc")
        app.path = tmp_path / "nowhere" / "notes.txt"
        keys.send_text("\x13")
        await until(lambda: "not saved: No such file" in app._status)
        app._show("one\r\ntwo\r\nabc", "", "suggested in 1 ms")
        assert "not saved: No such file" in app._status, "a suggestion that comes later takes its place"
        keys.send_text("d")
        await until(lambda: "suggested" in app._status)

    edit(editor, gen, path, scenario)


def test_tab_without_a_suggestion_is_a_tab_and_leaving_is_always_possible(editor, gen, tmp_path):
    async def scenario(app, keys, until):
        keys.send_text("\t")
        await until(lambda: app.buffer.text == "    ")
        keys.send_text("x" * 200)  # and leave while it thinks

    edit(editor, gen, tmp_path / "notes.txt", scenario)


def test_what_the_model_cannot_read_is_told_and_typing_goes_on(editor, gen, tmp_path):
    async def scenario(app, keys, until):
        await until(lambda: app.application.is_running)
        app.buffer.insert_text("Once \udcff")
        await until(lambda: "Unicode" in app._status)
        keys.send_text("\x7f")
        await until(lambda: suggested(app) == fresh(editor, gen, "Once "))

    edit(editor, gen, tmp_path / "notes.txt", scenario)


@pytest.mark.parametrize(("file", "model"), [("new.txt", "none.sdgm"), (".", None), ("binary", None)])
def test_what_cannot_be_opened_is_told_in_one_line(tmp_path, monkeypatch, capsys, editor, gen, file, model):
    (tmp_path / "binary").write_bytes(b"\x80\xff")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["editor.py", file, "--model", model or str(gen.bundle.path)])
    with pytest.raises(SystemExit) as ended:
        editor.main()
    assert ended.value.code == 1
    told = capsys.readouterr().err
    assert told.startswith("error: ")
    assert told.count("\n") == 1
