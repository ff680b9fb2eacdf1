#!/usr/bin/env bash
# LanceDB, a table of multivectors: a row whose multivector is empty is counted by `count_rows`, but no search returns it,
# however high its limit, not even without a query of its own to compare.
. "$(dirname "$0")/environment.sh" lancedb==0.40.0 numpy==2.4.6 pyarrow==26.0.1
python - <<'P'
import lancedb
import numpy as np
import pyarrow as pa

vectors = np.random.RandomState(0).randn(20, 3, 8).astype("float32")
schema = pa.schema([("id", pa.int64()), ("vector", pa.list_(pa.list_(pa.float32(), 8)))])
rows = [{"id": i, "vector": v.tolist()} for i, v in enumerate(vectors)] + [{"id": 20, "vector": []}]
table = lancedb.connect("db").create_table("t", pa.Table.from_pylist(rows, schema))
found = table.search(vectors[0]).distance_type("cosine").limit(1000).to_list()
print("rows:", table.count_rows(), " found:", len(found), " the empty one:", 20 in [row["id"] for row in found])
assert table.count_rows() == 21 and len(found) == 20
P
