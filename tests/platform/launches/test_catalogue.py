"""`list`, `describe` and `certify`: what they say of shipped and of one's own cards and components."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from deltalab import registry

Lab = Any  # conftest.Lab: test folders are no packages, so its name cannot be imported
SOUND = Path(__file__).parents[2] / "registry" / "third_party" / "sound_gates.py"
MARKUP = 'name: mine\ntitle: "[bold]Mine[/] [/x] :smile:"\nequation: "S [red]= [0]"\nsource: "[link=x]me"\ngate: leaky\n'


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a module, a folder of cards, and one of broken cards."""
    folder = tmp_path_factory.mktemp("own")
    shutil.copy(SOUND, folder / "my_gates.py")
    for name in ("cards", "broken"):
        (folder / name).mkdir()
        (folder / name / "mine.yaml").write_text(MARKUP)
    (folder / "broken" / "bad.yaml").write_text("name: bad\n")
    (folder / "broken" / "twin.yaml").write_text(MARKUP)
    (folder / "broken" / "wrong.yaml").write_text(MARKUP.replace("name: mine", "name: wrong").replace("leaky", "leeky"))
    return folder


def test_list_fits_a_hundred_columns_and_says_whose_a_thing_is(own: Path, command: Any) -> None:
    done = command(own, "list", "--registry", "cards", "--import", "my_gates", COLUMNS="100")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert max(map(len, lines)) <= 100
    cards = lines[1 : lines.index("", 1)]
    assert [line.split()[0] for line in cards] == sorted([*registry.names(), "mine"]), "one line a card"
    assert any(re.match(r"mine +\[your own\] \[bold\]Mine\[/\] \[/x\] :smile: \| gate leaky", line) for line in cards)
    assert re.search(r"gate +leaky +log a_t = .*\[my_gates\s+1\.5", done.stdout)


def test_list_names_what_is_broken(own: Path, command: Any) -> None:
    done = command(own, "list", "recurrences", "--registry", "broken", "--import", "my_gates")
    assert done.returncode == 0, done.stderr
    assert re.search(r"broken the card '.*/broken/bad.yaml' does not say its `equation`", done.stdout)
    assert re.search(r"broken the card '.*/broken/twin.yaml': its name 'mine' is another card's, '.*/mine.yaml'", done.stdout)
    words = " ".join(done.stdout.split())
    assert re.search(r"wrong \[your own\] broken: .*gate: unknown gate 'leeky'. Did you mean 'leaky'", words)
    assert re.search(r"mine +\[your own\]", done.stdout) and re.search(r"gdn +Gated DeltaNet", done.stdout)
    refused = command(own, "describe", "mine", "--registry", "broken", "--import", "my_gates")
    assert refused.returncode == 2 and "/broken/bad.yaml' does not say its `equation`" in refused.stderr
    lost = command(own, "list", "components", DELTALAB_IMPORT="no_gates")
    assert lost.returncode == 0 and "broken $DELTALAB_IMPORT: cannot import 'no_gates'" in lost.stdout and "scalar" in lost.stdout
    refused = command(own, "list", "components", "--import", "no_gates")
    assert refused.returncode == 2 and "--import: cannot import 'no_gates'" in refused.stderr


def test_describe_a_card_of_ones_own(own: Path, command: Any) -> None:
    done = command(own, "describe", "mine", "--registry", "cards", "--import", "my_gates", "--width", "64", "--heads", "2")
    assert done.returncode == 0, done.stderr
    for words in (
        "[bold]Mine[/] [/x] :smile:   [link=x]me   your own: ",
        "S [red]= [0]",
        r"log a_t = -r softplus(W x_t + b), one number per head.",
        "width 64, 2 heads, key width 32, value width 32",
        "online (delta rule)",
    ):
        assert words in done.stdout, words
    assert re.search(r"gate +proj\.weight +2 x 64 +N\(0, 0\.02\)", done.stdout)
    assert re.search(r"gate +b +2 +-3", done.stdout)


def test_describe_a_component_that_cannot_be_built(own: Path, command: Any) -> None:
    text = (own / "my_gates.py").read_text().replace("self.proj = Projection(shape.width, shape.heads)", "raise TypeError('no')")
    (own / "raising_gates.py").write_text(text)
    done = command(own, "describe", "mine", "--registry", "cards", "--import", "raising_gates")
    assert done.returncode == 2 and "mine: cannot be built at width 1024 with 8 heads: TypeError: no" in done.stderr
    done = command(own, "describe", "gate:leaky", "--import", "raising_gates")
    assert done.returncode == 0 and "cannot be built at width 1024 with 8 heads: TypeError: no" in done.stdout
    done = command(own, "certify", "gate:leaky", "--import", "raising_gates")
    assert done.returncode == 1 and "FAILED  contract" in done.stdout and "TypeError: no" in done.stdout


def test_describe_counts_what_a_mixer_has(cli: Any) -> None:
    mixer = registry.load("kda"), registry.load("softmax")
    from deltalab.recurrences import Mixer

    for spec in mixer:
        built = Mixer(spec, width=48, heads=3)
        out = cli("describe", spec.name, "--width", 48, "--heads", 3)[1]
        assert f"{sum(p.numel() for p in built.parameters()):,}" in out
        assert f"{built.state_bytes(1024):,} bytes a sequence" in out
        assert f"{built.flops_per_token(1024):,} FLOPs a token" in out


def test_describe_against(cli: Any) -> None:
    code, out, _ = cli("describe", "osdn", "--against", "deltanet")
    assert code == 0 and re.search(r"preconditioner +hypergradient +none", out)
    assert "The same in both: gate none, step size sigmoid, forgetting none" in out
    code, out, _ = cli("describe", "osdn", "--against", "osdn_bounded")
    assert re.search(r"preconditioner\.eta +1 +0\.003", out) and re.search(
        r"preconditioner\.box +\[0, inf\] +\[0\.666667, 1\.5\]", out
    )
    code, out, _ = cli("describe", "gdn gdn gdn softmax", "--against", "gdn")
    assert re.search(r"pattern\[3\]\.kind +softmax +recurrence", out) and "4 layers" in out
    code, out, _ = cli("describe", "mamba2", "--against", "gdn")
    assert re.search(r"block\.skip +true +false", out) and "They differ in the block as well" in out
    code, out, _ = cli("describe", "gdn", "--against", "gdn")
    assert code == 0 and "no choice differs" in out
    code, _, err = cli("describe", "gdn", "--against", "gnd")
    assert code == 2 and "--against: unknown recurrence 'gnd'. Did you mean 'gdn'?" in err


def test_presets_are_listed_and_described_by_alias_with_their_counts(cli: Any) -> None:
    code, out, _ = cli("list", "presets")
    assert code == 0 and "pdn-1b" in out
    said = " ".join(cli("describe", "340m")[1].split())
    for words in ("osdn-340m", "deltanet 374,362,112 374,362,112", "gdn 379,888,124 379.9M layers 21", "width 1024"):
        assert words in said
    assert "Did you mean 'pdn-1b'?" in cli("describe", "pdn1b")[2]


def test_describe_a_component(cli: Any) -> None:
    code, out, _ = cli("describe", "hypergradient")
    assert code == 0 and "d_{t+1} = clip(" in out
    assert re.search(r"eta +1 +>= 0, <= 2 +learning rate", out) and re.search(r"clip +token +token \| chunk \| none", out)
    assert re.search(r"first +8 x 128 +0", out)
    code, out, _ = cli("describe", "tied")
    assert code == 0 and "(gate)" in out and "(forgetting)" in out
    code, out, _ = cli("describe", "gate:tied")
    assert code == 0 and "(gate)" in out and "(forgetting)" not in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("describe", "gdn gnd"), "recurrence.pattern[1]: unknown recurrence 'gnd'"),
        (("describe", "gate:tide"), "unknown name 'gate:tide'"),
        (("describe", "gdn", "--width", "10", "--heads", "4"), "heads: 4 does not divide width 10"),
        (("describe", "gdn", "--registry", "nowhere"), "--registry: the folder 'nowhere' does not exist"),
        (("describe", "gdn", "--import", "a b"), "--import: cannot import 'a b': that is no module's name"),
        (("certify", "gnd"), "card: unknown recurrence 'gnd'. Did you mean 'gdn'?"),
        (("certify", "gate:nix"), "gate: unknown gate 'nix'"),
        (("certify", "empty.yaml"), "'empty.yaml' holds no mapping"),
        (("certify", "folder.yaml"), "cannot read 'folder.yaml': Is a directory"),
        (("certify", "folder"), "'folder' is a folder; use its cards by name with --registry folder"),
    ],
)
def test_mistakes(cli: Any, arguments: tuple[str, ...], words: str) -> None:
    Path("empty.yaml").write_text("")
    for name in ("folder", "folder.yaml"):
        Path(name).mkdir()
    code, _, err = cli(*arguments)
    assert code == 2 and words in err and "Traceback" not in err


def test_certify(cli: Any) -> None:
    code, out, err = cli("certify", "gdn softmax", "gate:fixed")
    assert code == 0, err
    assert re.search(r"holds +causality +What comes later", out) and "FAILED" not in out
    assert "certified: gdn softmax pattern[0], gdn softmax pattern[1], gate:fixed on deltanet" in out


def test_certify_a_card_that_does_not_conform(cli: Any) -> None:
    Path("mine.yaml").write_text(
        "name: mine\nequation: S\nsource: me\npreconditioner: {name: hypergradient, clip: chunk, initial: 0.5, box: [0.4, 0.6]}\n"
    )
    code, out, _ = cli("certify", "mine.yaml")
    assert code == 1 and "not certified: mine.yaml" in out
    assert re.search(r"FAILED +streaming +Prefill, then token by token", out) and "The card warns: clip: chunk" in out
    assert re.search(r"holds +gradients", out)


def test_the_suite_as_pytest(own: Path) -> None:
    """By the command of the docs: the suite's options come with the installation, by its entry point."""

    def suite(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [str(Path(sys.executable).parent / "pytest"), "-q"]
        command += ["-p", "no:cacheprovider", "--pyargs", "deltalab.tests.conformance", *arguments]
        return subprocess.run(command, cwd=own, capture_output=True, text=True, check=False)

    nothing = suite()
    assert nothing.returncode == 5 and "nothing to certify; give --card my_card.yaml" in nothing.stdout
    options = ("--registry", "cards", "--import", "my_gates")
    done = suite("--card", "mine", "--card", "cards/mine.yaml", "--component", "gate:leaky", *options)
    assert done.returncode == 0 and "57 passed" in done.stdout, done.stdout
    (own / "chunk.yaml").write_text(
        "name: chunk\nequation: S\nsource: me\n"
        "preconditioner: {name: hypergradient, clip: chunk, initial: 0.5, box: [0.4, 0.6]}\n"
    )
    failed = suite("--card", "chunk.yaml")
    assert failed.returncode == 1 and "FAILED" in failed.stdout and "test_conformance[chunk.yaml-streaming]" in failed.stdout
    wrong = suite("--card", "gnd")
    assert wrong.returncode == 2 and "card: unknown recurrence 'gnd'. Did you mean 'gdn'?" in wrong.stdout
