import doctest
import math

import pytest
import torch
import torch.nn.functional as F
from tiny import randn

from hf_sugar.training import ContrastiveLoss
from hf_sugar.training.loss import StructureLoss


def looped(embeddings, labels):
    """Eq. 3, term by term, in float64."""
    embeddings, labels = embeddings.detach().double(), labels.double()
    total = 0.0
    for i, a in enumerate(embeddings):
        for j, b in enumerate(embeddings):
            cosine = sum(p * q for p, q in zip(a.tolist(), b.tolist(), strict=True)) / float(a.norm() * b.norm())
            total += (cosine - float(labels[i, j])) ** 2
    return total


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(0)
    labels = torch.rand(7, 7, generator=generator)
    return torch.randn(7, 5, generator=generator), (labels + labels.T) / 2


@pytest.mark.parametrize(("reduction", "divisor"), [("row_mean", 7), ("mean", 49), ("sum", 1)])
def test_equals_a_loop(inputs, reduction, divisor):
    embeddings, labels = inputs
    loss = StructureLoss(reduction)(embeddings, labels)
    assert loss.shape == () and loss.dtype == torch.float32
    assert StructureLoss().reduction == "row_mean"  # the paper's 1/n
    torch.testing.assert_close(loss.item(), looped(embeddings, labels) / divisor, rtol=1e-5, atol=0)


def test_by_hand():
    # cosines: 1 on the diagonal, 0 beside it; the labels miss by 0 and 0.5
    embeddings = torch.tensor([[2.0, 0.0], [0.0, 0.1]])
    labels = torch.tensor([[1.0, 0.5], [0.5, 1.0]])
    assert StructureLoss()(embeddings, labels).item() == pytest.approx(0.25)


def test_ignores_the_scale_of_embeddings(inputs):
    embeddings, labels = inputs
    scales = torch.linspace(0.01, 100, 7)[:, None]
    torch.testing.assert_close(StructureLoss()(embeddings * scales, labels), StructureLoss()(embeddings, labels))


def test_gradients(inputs):
    embeddings, labels = (tensor.double() for tensor in inputs)
    labels.requires_grad_()
    assert torch.autograd.gradcheck(lambda e: StructureLoss()(e, labels), embeddings.requires_grad_())
    StructureLoss()(embeddings, labels).backward()
    assert labels.grad is None


def test_is_zero_at_its_labels_and_can_be_learned(inputs):
    target = torch.nn.functional.normalize(inputs[0], dim=1)
    labels = target @ target.T
    assert StructureLoss()(target * 3, labels).item() < 1e-10
    embeddings = torch.randn(7, 5, generator=torch.Generator().manual_seed(1)).requires_grad_()
    optimizer = torch.optim.Adam([embeddings], lr=0.05)
    for _ in range(300):
        optimizer.zero_grad()
        loss = StructureLoss()(embeddings, labels)
        loss.backward()
        optimizer.step()
    assert loss.item() < 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_computes_in_float32_under_autocast(inputs, dtype):
    embeddings, labels = inputs
    with torch.autocast("cpu", dtype=dtype):
        loss = StructureLoss()(embeddings, labels)
        half = StructureLoss()(embeddings.to(dtype).requires_grad_(), labels)
    assert loss.dtype == half.dtype == torch.float32
    assert loss.item() == StructureLoss()(embeddings, labels).item()
    assert half.item() == StructureLoss()(embeddings.to(dtype).float(), labels).item()


@pytest.mark.parametrize("n", [0, 1])
def test_zero_without_a_pair_stays_in_the_graph(n):
    embeddings = torch.randn(n, 4, requires_grad=True)
    loss = StructureLoss()(embeddings * 2, torch.full((n, n), 0.3))
    assert loss.item() == 0
    loss.backward()
    assert torch.equal(embeddings.grad, torch.zeros(n, 4))


def test_errors(inputs):
    embeddings, labels = inputs
    with pytest.raises(ValueError, match="`reduction`.*'average'"):
        StructureLoss("average")
    with pytest.raises(ValueError, match=r"`embeddings`.*\(n, dim\).*\(7,\)"):
        StructureLoss()(embeddings[:, 0], labels)
    with pytest.raises(ValueError, match=r"`labels`.*\(7, 7\).*\(7, 6\)"):
        StructureLoss()(embeddings, labels[:, :6])


def test_docstring_example():
    names = {}
    for example in doctest.DocTestParser().get_examples(StructureLoss.__doc__):
        exec(example.source, names)
    assert names["embeddings"].grad.shape == (5, 8) and names["embeddings"].grad.any()


class TestContrastiveLoss:
    def test_one_positive_each_is_cross_entropy(self):
        queries, candidates = randn(6, 8), randn(9, 8, seed=1)
        scores = F.cosine_similarity(queries[:, None], candidates[None], dim=-1) / 0.07
        expected = F.cross_entropy(scores, torch.arange(6)) + F.cross_entropy(scores.T[:6], torch.arange(6))
        loss = ContrastiveLoss(0.07)(3 * queries, candidates, torch.eye(6, 9, dtype=torch.bool))
        assert loss.item() == pytest.approx(expected.item() / 2, rel=1e-6)

    @pytest.mark.extras
    def test_equals_sentence_transformers(self):
        losses = pytest.importorskip("sentence_transformers.sentence_transformer.losses")
        queries, positives, negatives = (randn(5, 8, seed=seed) for seed in range(3))
        pairs = torch.eye(5, 10, dtype=torch.bool)
        theirs = losses.MultipleNegativesRankingLoss(
            None, directions=("query_to_doc", "doc_to_query"), partition_mode="per_direction"
        )
        expected = theirs.compute_loss_from_embeddings([queries, positives, negatives], None)
        found = ContrastiveLoss(1 / 20)(queries, torch.cat([positives, negatives]), pairs)
        assert found.item() == pytest.approx(expected.item(), rel=1e-6)

    def test_several_positives_and_pairs_that_are_ignored(self):
        queries, candidates = randn(4, 8), randn(5, 8, seed=1)
        positives = torch.tensor([[1, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0] * 5, [0, 0, 0, 1, 0]]).bool()
        ignored = torch.tensor([[0, 0, 1, 0, 0], [0] * 5, [1] * 5, [0, 0, 0, 0, 1]]).bool()
        scores = F.normalize(queries, dim=1) @ F.normalize(candidates, dim=1).T / 0.1

        def one_way(scores, positives, ignored):
            terms = []
            for i, j in positives.nonzero().tolist():
                others = [k for k in range(len(scores[i])) if not positives[i, k] and not ignored[i, k]]
                if others:
                    terms.append(-math.log(1 / (1 + sum(math.exp(scores[i, k] - scores[i, j]) for k in others))))
            return sum(terms) / len(terms)

        expected = one_way(scores, positives, ignored) + one_way(scores.T, positives.T, ignored.T)
        loss = ContrastiveLoss()(queries, candidates, positives, ignored)
        assert loss.item() == pytest.approx(expected / 2, rel=1e-9)

    def test_temperature_can_be_learnt(self):
        loss, pairs = ContrastiveLoss(learn_temperature=True), torch.eye(3, 4, dtype=torch.bool)
        value = loss(randn(3, 8), randn(4, 8, seed=1), pairs)
        assert value.item() == pytest.approx(
            ContrastiveLoss()(randn(3, 8), randn(4, 8, seed=1), pairs).item(), rel=1e-6
        )
        value.backward()
        assert loss.log_temperature.grad != 0

    def test_nothing_to_tell_apart(self):
        queries = randn(3, 8).requires_grad_()
        for positives in (torch.zeros(3, 4).bool(), torch.ones(3, 4).bool()):
            loss = ContrastiveLoss()(queries, randn(4, 8), positives)
            loss.backward()
            assert loss.item() == 0 and not queries.grad.any()
        with pytest.raises(ValueError, match=r"`ignored` must have shape \(3, 4\)"):
            ContrastiveLoss()(queries, randn(4, 8), torch.ones(3, 4).bool(), torch.ones(4, 3).bool())
