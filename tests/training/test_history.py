from s2seg.training.history import Standing


def test_a_standing_counts_the_batches_of_all_epochs():
    standing = Standing(epoch=2, epochs=3, step=1, steps=4)
    assert (standing.done, standing.total) == (5, 12)


def test_the_last_batch_is_the_whole():
    standing = Standing(epoch=3, epochs=3, step=4, steps=4)
    assert standing.done == standing.total
