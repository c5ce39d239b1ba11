# nanoGPT's recipe for GPT-2 on OpenWebText.
batch_size = 12
gradient_accumulation_steps = 40 # 12 * 40 * 1024 = 491,520 tokens a step, 300 billion in all
max_iters = 600000
eval_interval = 1000
eval_iters = 200
learning_rate = 6e-4
min_lr = 6e-5
warmup_iters = 2000
weight_decay = 0.1
beta2 = 0.95
compile = True
