"""The smallest use: a batch of tensors, without a data set or a process group."""

import torch
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor

from esmm_torchrec import ESMM, EsmmTrainTask, ImpressionBatch

item = EmbeddingBagConfig(name="item", num_embeddings=10, embedding_dim=8, feature_names=["item"])
seen = EmbeddingBagConfig(name="seen", num_embeddings=10, embedding_dim=8, feature_names=["seen"])
task = EsmmTrainTask(ESMM(EmbeddingBagCollection(tables=[item, seen])))
optimizer = torch.optim.Adagrad(task.parameters(), lr=0.01)

features = KeyedJaggedTensor.from_lengths_sync(
    keys=["item", "seen"],
    values=torch.tensor([3, 1, 4, 1, 5, 9, 2, 6]),  # one item each; 2, 0, 1 and 1 items seen before
    lengths=torch.tensor([1, 1, 1, 1, 2, 0, 1, 1]),
)
click, conversion = torch.tensor([[1.0, 1, 1, 0], [1.0, 0, 0, 0]])
batch = ImpressionBatch(sparse_features=features, click=click, conversion=conversion)

for _ in range(20):
    loss, _ = task(batch)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
print("pCVR", task.model(features).conversion.sigmoid().tolist())
