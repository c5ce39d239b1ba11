# TinyStories with GPT-2's tokens, for the search and for what it found.
dropout = 0.2
batch_size = 12
gradient_accumulation_steps = 20 # 12 * 20 * 224 = 53,760 tokens a step
eval_interval = 100
eval_iters = 100
learning_rate = 5e-4
min_lr = 5e-5
warmup_iters = 100
beta2 = 0.99
compile = True
