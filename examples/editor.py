"""A text editor that suggests how the line goes on, while you type.

    python examples/editor.py notes.txt --model bundles/mine

The suggestion stands in grey behind the cursor at the end of the text: Tab takes it, Ctrl-Right its first
word, any other key goes on without it. Ctrl-S saves, Ctrl-Q leaves.

What makes it quick: a session holds the text up to the word that is being typed. A key that adds to that word
runs the few tokens of the word and no more; one that deletes rewinds the session to where the text still
agrees, exactly, from the states that it kept. What is suggested for a text does not depend on how it was
typed.
"""

import argparse
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path

from prompt_toolkit.application import Application
from prompt_toolkit.auto_suggest import Suggestion
from prompt_toolkit.buffer import Buffer
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.layout import HSplit, Layout, Window
from prompt_toolkit.layout.controls import FormattedTextControl
from prompt_toolkit.layout.processors import AppendAutoSuggestion
from prompt_toolkit.widgets import TextArea

from sdgm_edge.runtime import Generator, SdgmError, StateError

TOKENS = 16
"""Of a suggestion."""
HISTORY = 256
"""Tokens that a deletion may take back at no cost; beyond that, the text is read again."""


class Suggester:
    """Suggestions for a text that changes; one thread at a time."""

    def __init__(self, generator: Generator, num_tokens: int = TOKENS) -> None:
        self._generator, self._num_tokens = generator, num_tokens
        self._begin()

    def _begin(self) -> None:
        self._session = self._generator.session(history=HISTORY)
        self._text = ""
        self._marks = [(0, 0)]
        """Places of the text, and how many tokens lie before each: where the session can go back to."""

    def suggest(self, text: str, cancel: Callable[[], bool] = lambda: False) -> str:
        """How the line may go on; as far as it got, where `cancel` says so."""
        if not text:
            return ""
        # The word being typed is not read for good: the next key may make another token of it.
        last_word = re.search(r"(?<=\S)\s+\S*$", text)
        place = last_word.start() if last_word else 0
        self._follow(text[:place])
        made = self._generator.generate(
            text[place:],
            session=self._session.fork(),
            heal=True,
            cancel=cancel,
            temperature=0,
            max_new_tokens=self._num_tokens,
            stop="\n",
        )
        return made.text

    def _follow(self, text: str) -> None:
        """Bring the session to the end of this text."""
        while not (text.startswith(self._text[: self._marks[-1][0]])):
            self._marks.pop()
        place, num_tokens = self._marks[-1]
        try:
            self._session.rewind(self._session.position - num_tokens)
        except StateError:  # so far back that it is read again
            self._begin()
            place = 0
        if text[place:]:
            self._session.feed(text[place:])
            self._marks.append((len(text), self._session.position))
        self._text = text


class Editor:
    """The application; `run` it."""

    def __init__(self, path: Path, generator: Generator) -> None:
        self.path, self._suggester = path, Suggester(generator)
        text = path.read_bytes().decode() if path.exists() else ""  # its line ends as they are
        area = TextArea(text, scrollbar=True, input_processors=[AppendAutoSuggestion()])
        self.buffer: Buffer = area.buffer
        self.buffer.cursor_position = len(text)
        self.buffer.on_text_changed += self._typed
        self._status = f"{path}   Tab takes a suggestion, Ctrl-Right a word; Ctrl-S saves, Ctrl-Q leaves"
        self._saved = ""  # what came of saving, until the text changes: no suggestion takes its place
        bar = Window(FormattedTextControl(lambda: self._status), height=1, style="reverse")
        self.application: Application[None] = Application(
            Layout(HSplit([area, bar])), key_bindings=self._keys(), full_screen=True
        )
        self._changed = threading.Condition()
        self._wanted: str | None = None
        self._version = 0
        self._over = False

    def run(self) -> None:
        """Edit until the user leaves."""
        with self:
            self.application.run()

    def __enter__(self) -> "Editor":
        self._thread = threading.Thread(target=self._work, name="suggestions")
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._over, self._version = True, self._version + 1
            self._changed.notify()
        self._thread.join()

    def _typed(self, buffer: Buffer) -> None:
        """Ask for a suggestion for the text as it is now; the one that is being made is given up."""
        self._saved = ""
        with self._changed:
            self._wanted, self._version = buffer.text, self._version + 1
            self._changed.notify()

    def _work(self) -> None:
        """Suggest, in a thread of its own, for the newest text."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._over or self._wanted is not None)
                if self._over:
                    return
                text, self._wanted, version = self._wanted or "", None, self._version
            began = time.perf_counter()
            try:
                suggestion = self._suggester.suggest(text, lambda version=version: version != self._version)
                status = f"suggested in {1e3 * (time.perf_counter() - began):.0f} ms"
            except SdgmError as error:  # of text that is not Unicode, pasted from somewhere
                suggestion, status = "", str(error)
            if version == self._version and (loop := self.application.loop) is not None:
                loop.call_soon_threadsafe(self._show, text, suggestion, status)

    def _show(self, text: str, suggestion: str, status: str) -> None:
        if text == self.buffer.text:
            self.buffer.suggestion = Suggestion(suggestion) if suggestion else None
            self._status = f"{self.path}   {self._saved or status}"
            self.application.invalidate()

    def _keys(self) -> KeyBindings:
        keys = KeyBindings()

        @keys.add("tab")
        def _(event: KeyPressEvent) -> None:
            self._take(r"(?s).*", "    ")

        @keys.add("c-right")
        def _(event: KeyPressEvent) -> None:
            self._take(r"\s*\S*", "")

        @keys.add("c-s")
        def _(event: KeyPressEvent) -> None:
            try:
                self.path.write_bytes(self.buffer.text.encode())
                self._saved = "saved"
            except OSError as reason:
                self._saved = f"not saved: {reason.strerror}"
            self._status = f"{self.path}   {self._saved}"

        @keys.add("c-q")
        def _(event: KeyPressEvent) -> None:
            event.app.exit()

        return keys

    def _take(self, part: str, otherwise: str) -> None:
        """Insert that part of the suggestion."""
        found = re.match(part, self.buffer.suggestion.text) if self.buffer.suggestion else None
        at_end = self.buffer.document.is_cursor_at_the_end
        self.buffer.insert_text(found.group() if found and at_end else otherwise)


def main() -> None:
    """Edit a file."""
    parser = argparse.ArgumentParser(description="A text editor that suggests how the line goes on.")
    parser.add_argument("file", type=Path)
    parser.add_argument("--model", "-m", required=True, help="a bundle")
    parser.add_argument("--variant")
    options = parser.parse_args()
    try:
        editor = Editor(options.file, Generator.load(options.model, options.variant))
    except (SdgmError, OSError, UnicodeDecodeError) as error:
        parser.exit(1, f"error: {error}\n")
    editor.run()


if __name__ == "__main__":
    main()
