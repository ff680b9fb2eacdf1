#!/usr/bin/env bash
# FAISS, an IVF index of 100 vectors: number 0 is removed, one vector is added. It gets the number 99, which another vector has:
# `remove_ids` keeps the numbers of an IVF index, and `add` counts on from the number of vectors. (A flat index renumbers.)
. "$(dirname "$0")/environment.sh" faiss-cpu==1.15.1 numpy==2.4.6
python - <<'P'
import faiss
import numpy as np

vectors = np.random.RandomState(0).randn(101, 8).astype("float32")
index = faiss.index_factory(8, "IVF4,Flat")
index.train(vectors)
index.add(vectors[:100])
index.nprobe = 4
index.remove_ids(np.array([0]))
index.add(vectors[100:])
distances, found = index.search(vectors[99:], 1)
print("vector 99 is found as", found[0], "and the new one as", found[1], "at the distances", distances.ravel())
assert found.tolist() == [[99], [99]] and distances.max() < 1e-4
P
