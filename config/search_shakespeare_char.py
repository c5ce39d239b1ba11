# Shakespeare by characters: 1,791,153 architectures of 0.33 to 10.7 million parameters, one GPU.
# python prepare.py --dataset=shakespeare_char
# python train_search.py config/search_shakespeare_char.py config/drnas.py
# Published for this space and schedule (TangleNAS; test loss, retrained, mean of seeds):
# DrNAS 1.4547, SPOS with random search 1.4540, GDAS 1.6643 (20,000 iterations), DARTS 1.7224.
include('shared/shakespeare_char.py')
include('shared/gpt2_block.py')
out_dir = 'out/search_shakespeare_char'
dataset = 'shakespeare_char'
n_layer = [4, 5, 6]
n_head = [2, 4, 6]
n_embd = [96, 192, 384]
mlp_ratio = [2, 3, 4]
bias = False

train_portion = 0.5 # the published runs also use 0.8
block_size = 256 # 16,384 tokens a step
max_iters = 10000
learning_rate = 1e-4
min_lr = 1e-5
arch_learning_rate = 3e-4
