"""Who is blamed when a process dies. The book alone, without Ray."""

from zsplg_ray.cluster.ledger import MAX_KILLS, LedgerBook


def test_an_image_begun_and_never_finished_is_to_blame():
    book = LedgerBook()
    assert book.open("label", ["a", "b"]) == {"a": 0, "b": 0}
    book.begin("label", ["a"])
    assert book.open("label", ["a", "b"]) == {"a": 1, "b": 0}
    book.begin("label", ["a"])
    assert book.open("label", ["a"]) == {"a": 2}


def test_an_image_that_was_finished_is_innocent():
    book = LedgerBook()
    book.begin("label", ["a"])
    book.finish("label", ["a"])
    book.finish("label", ["never begun"])
    assert book.open("label", ["a", "never begun"]) == {"a": 0, "never begun": 0}
    book.begin("label", ["a"])
    assert book.open("label", ["a"]) == {"a": 1}, "finishing cleared more than what was begun"


def test_stages_are_apart():
    book = LedgerBook()
    book.begin("decode", ["a"])
    assert (book.open("decode", ["a"]), book.open("label", ["a"])) == ({"a": 1}, {"a": 0})
    book.finish("label", ["a"])
    assert book.open("decode", ["a"]) == {"a": 1}


def test_what_is_written_is_not_open_at_any_stage():
    book = LedgerBook()
    book.begin("label", ["a"])
    book.commit(["a", "b"])
    for stage in ("decode", "label"):
        assert book.open(stage, ["a", "b", "c"]) == {"c": 0}


def test_looking_notes_nothing():
    book = LedgerBook()
    book.open("label", [str(i) for i in range(1000)])
    assert not book.begun and not book.committed


def test_the_one_that_kills_is_found_and_its_neighbours_are_done():
    """A task of five images, of which the third kills its process each time it is tried."""
    book, done, deaths = LedgerBook(), [], 0
    while todo := book.open("label", list("abXcd")):
        for image in sorted(todo, key=lambda i: todo[i]):  # suspects last, as the actor does
            if todo[image] >= MAX_KILLS:
                book.commit([image])  # quarantined
                continue
            book.begin("label", [image])
            if image == "X":
                deaths += 1
                break
            book.finish("label", [image])
            done.append(image)
            book.commit([image])
        assert deaths <= MAX_KILLS, "tried for ever"
    assert sorted(done) == list("abcd") and deaths == MAX_KILLS
