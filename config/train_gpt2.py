# GPT-2 small (124 million parameters) on OpenWebText, about 4 days on a node of 8 A100; nanoGPT reports a loss of about 2.85.
# python prepare.py --dataset=openwebtext
# torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py
out_dir = 'out/train_gpt2'
dataset = 'openwebtext'
n_layer = 12
n_head = 12
n_embd = 768
block_size = 1024

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
