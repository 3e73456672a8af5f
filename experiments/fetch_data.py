"""Fetch the public texts that the experiments use, by commit, and check every file's hash.

    python experiments/fetch_data.py data        then: SLM_DATA=data experiments/<name>/run.sh

Needs git and a network. Files that a published file was made into are made again here; a file is
only written if its sha256 is the one that the committed results were computed with.
"""

import argparse
import hashlib
import json
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

Git = Callable[[str], bytes]  # path in the repository -> its content at the commit
FUTON = "data/stackexchange-samples"
WIKI = "word_language_model/data/wikitext-2"
SITES = ("math.stackexchange.com", "mathoverflow.net")
TOPICS = ("category-theory", "mathematical-physics")

# (repository, commit) -> {file here: path there}
SOURCES: dict[tuple[str, str], dict[str, str]] = {
    ("openai/grade-school-math", "3101c7d"): {
        "curated/gsm8k_train.jsonl": "grade_school_math/data/train.jsonl",
        "eval/gsm8k_test.jsonl": "grade_school_math/data/test.jsonl",
    },
    ("ZubinGou/math-evaluation-harness", "db77bc6"): {
        "eval/math_500.jsonl": "data/math_oai/test.jsonl",
        "eval/asdiv.jsonl": "data/asdiv/test.jsonl",
        "eval/mmlu_stem.jsonl": "data/mmlu_stem/test.jsonl",
        "eval/svamp.jsonl": "data/svamp/test.jsonl",
        "eval/mathqa.jsonl": "data/mathqa/test.jsonl",
        "eval/mawps.jsonl": "data/mawps/test.jsonl",
        "eval/sat_math.jsonl": "data/sat_math/test.jsonl",
    },
    ("google-deepmind/AQuA", "26b64ed"): {
        "raw/aqua_dev.jsonl": "dev.json",
        "raw/aqua_test.jsonl": "test.json",
    },
    ("karpathy/char-rnn", "6f9487a"): {
        "general/tinyshakespeare.txt": "data/tinyshakespeare/input.txt",
    },
    ("pytorch/examples", "77f55b9"): {
        "general/wikitext2_valid.txt": f"{WIKI}/valid.txt",
        "general/wikitext2_test.txt": f"{WIKI}/test.txt",
    },
    ("tothedarktowercame/futon6", "3f7810c"): {
        f"raw/se_{site}__{topic}.jsonl": f"{FUTON}/{site}__{topic}.jsonl"
        for site in SITES
        for topic in TOPICS
    },
}  # fmt: skip
MATH = ("ZubinGou/math-evaluation-harness", "db77bc6")
PLANETMATH = ("planetmath/11_Number_theory", "da34257")

# sha256  file
HASHES = """
17f347dc51477c50d4efb83959dbb7c56297aba886e5544ee2aaed3024813465  curated/gsm8k_train.jsonl
be6345cd467dad18d5d32cf59d334910327a5f1f2d3289df7ce133107cc45ae7  curated/math_train_4500.jsonl
5759580385e706f961a30d4c07d6925b35c3f7c86d6c50bc413957169693dad2  eval/asdiv.jsonl
3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14  eval/gsm8k_test.jsonl
35dc41080a3680858b27fa7e0533d2d547825316fc5dafe5d316f4ccc5a06132  eval/math_500.jsonl
136de4608366708d01d4c38890437e722c9209e9a66ef5d119cb01f6f88dfec6  eval/mathqa.jsonl
fd7c16f96067d285638abb5aaef9cd8a063b11454e14cb64df93141a58691478  eval/mmlu_stem.jsonl
00ffe31161be8623a3d36741830edbba87a3aee0109f693810fe40b9d5d91b8b  eval/mawps.jsonl
96720a1dc496ea72f80db55250290cf9c48e95b657ac2183b7deb1dc4627351f  eval/sat_math.jsonl
d0826ff1264f3860e46fc4e71db9e31d2d188960db87090e22677f9493e67a0d  eval/svamp.jsonl
86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed  general/tinyshakespeare.txt
d790b833ef8cf03a90db7bf1271b7520b83c45ce07ba3c1a9699df81e239eca0  general/wikitext2_test.txt
f0737ed31fc1329026e95cb8b98e19c2a182c39c240ab909dc31abf2f8af58e8  general/wikitext2_valid.txt
4a52301d8a49ae0b286f8e697f9c5da1b109b247b825b47b4c6de34312dceec5  raw/aqua_dev.jsonl
de41581881ef95c5588c44ddc701c77fd480839241dd422a0d181262af24520c  raw/aqua_test.jsonl
ea1af53f75ad81524c67c6d426357a0f99085126d1d56dd77c890c4bd8160ffb  raw/planetmath_nt.jsonl
7ac68d4a0e16103ed72a9c400db308d9879738772d598d915386a94509bf1fe0  raw/se_math.stackexchange.com__category-theory.jsonl
b205e533a71dcf5b762726077e5733920f8b2a7c1389e7622b10ea4a5b5739da  raw/se_math.stackexchange.com__mathematical-physics.jsonl
015d502f9d78208f6ded798c7944cc323a1dff41e8a008dd8bd91362b5b7e3cd  raw/se_mathoverflow.net__category-theory.jsonl
82798ba9f6e680e5b274e4c3bf3b0d94ed585d19291f2c27f5628e4daa3d151b  raw/se_mathoverflow.net__mathematical-physics.jsonl
"""  # noqa: E501
SHA256 = {name: digest for digest, name in map(str.split, HASHES.strip().splitlines())}


def run_git(folder: Path, *words: str) -> bytes:
    return subprocess.run(
        ["git", "-C", str(folder), *words], check=True, capture_output=True
    ).stdout


def clone(repository: str, into: Path) -> Path:
    folder = into / repository.replace("/", "__")
    if not folder.exists():
        url = f"https://github.com/{repository}.git"
        words = ["git", "clone", "--quiet", "--no-checkout", "--filter=blob:none", url, str(folder)]
        subprocess.run(words, check=True)
    return folder


def math_train(git: Git) -> bytes:
    """The MATH test problems that are not among the 500 of the evaluation set."""
    held = {json.loads(line)["problem"] for line in git("data/math_oai/test.jsonl").splitlines()}
    lines = git("data/math/test.jsonl").splitlines(keepends=True)
    return b"".join(line for line in lines if json.loads(line)["problem"] not in held)


def planetmath(folder: Path, git: Git) -> bytes:
    """Every entry's TeX, with the span between \\begin{document} and \\end{document} as `body`."""
    names = run_git(folder, "ls-tree", "--name-only", PLANETMATH[1]).decode().splitlines()
    rows = []
    for name in sorted(name for name in names if name.endswith(".tex")):
        text = git(name).decode("utf-8", errors="replace")
        opening = "\\begin{document}"
        body = [text.find(opening) + len(opening), text.rfind("\\end{document}")]
        rows.append(json.dumps({"path": name, "text": text, "body": body}, ensure_ascii=False))
    return "".join(f"{row}\n" for row in rows).encode()


def write(target: Path, name: str, data: bytes) -> None:
    found = hashlib.sha256(data).hexdigest()
    if found != SHA256[name]:
        raise SystemExit(f"{name}: sha256 is {found}, expected {SHA256[name]}; not written")
    (target / name).parent.mkdir(parents=True, exist_ok=True)
    (target / name).write_bytes(data)
    print(f"{name}: {len(data):,} bytes")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("target", type=Path)
    target = parser.parse_args().target
    with tempfile.TemporaryDirectory() as scratch:

        def at(repository: str, commit: str) -> Git:
            folder = clone(repository, Path(scratch))
            return lambda path: run_git(folder, "show", f"{commit}:{path}")

        for (repository, commit), files in SOURCES.items():
            git = at(repository, commit)
            for name, path in files.items():
                write(target, name, git(path))
        write(target, "curated/math_train_4500.jsonl", math_train(at(*MATH)))
        folder = clone(PLANETMATH[0], Path(scratch))
        write(target, "raw/planetmath_nt.jsonl", planetmath(folder, at(*PLANETMATH)))


if __name__ == "__main__":
    main()
