"""From WikiText's tokens back to text."""

import subprocess
import sys

import pytest

from sdgm_edge.detokenization import naturalize, naturalized


@pytest.mark.parametrize(
    ("tokens", "text"),
    [
        (" A real @-@ time game of 1 @,@ 200 @.@ 5 parts . ", "A real-time game of 1,200.5 parts."),
        (" = = Game play = = ", "Game play"),
        (" = Valkyria = ", "Valkyria"),
        (" It was , he said ( in 2011 ) ; good : very ! ", "It was, he said (in 2011); good: very!"),
        (' He said " no " , and " not so " . ', 'He said "no", and "not so".'),
        (" It wasn 't May 's ; they 're O 'Brien 's . ", "It wasn't May's; they're O'Brien's."),
        (" the two nations ' cease @-@ fire ", "the two nations' cease-fire"),
        (" It cost $ 14 or £ 2 , some 5 % . ", "It cost $14 or £2, some 5%."),
        (" May 15 – 18 , or not ... ", "May 15 – 18, or not..."),
        (" x = 3 is a sum . ", "x = 3 is a sum."),
        (" ", ""),
    ],
)
def test_a_line_is_written_as_people_write_it(tokens, text):
    assert naturalize(tokens) == text


def test_a_sentence_with_an_unknown_word_is_left_out():
    line = " It was late . <unk> left . Mr. <unk> , who came , sang . Was it so ? Yes . "
    assert naturalize(line) == "It was late. Was it so? Yes."


def test_lines_that_are_left_with_nothing_are_dropped():
    assert list(naturalized([" ", " = <unk> = ", " Yes . ", ""])) == ["Yes."]


def test_a_sentence_may_end_inside_a_quotation():
    assert naturalize(' " I came . " He did not . <unk> did . ') == '"I came." He did not.'


def test_the_command_reads_files_and_stdin(tmp_path):
    file = tmp_path / "wiki.txt"
    file.write_text(" = A = \n \n A @-@ b . <unk> c . \n", encoding="utf-8")
    command = [sys.executable, "-m", "sdgm_edge", "detokenize"]
    named = subprocess.run([*command, str(file)], capture_output=True, text=True, check=True)
    with file.open() as stdin:
        piped = subprocess.run(command, stdin=stdin, capture_output=True, text=True, check=True)
    assert named.stdout == piped.stdout == "A\nA-b.\n"
    missing = subprocess.run([*command, str(tmp_path / "none")], capture_output=True, text=True)
    assert (missing.returncode, missing.stdout) == (1, "")
    assert missing.stderr.startswith("error: ")
