# Retrains what a search on Shakespeare's characters found, on one GPU.
# python train_base.py config/base_shakespeare_char.py --arch=out/search_shakespeare_char_drnas/arch.json
out_dir = 'out/base_shakespeare_char'
batch_size = 64
max_iters = 5000
eval_interval = 250
eval_iters = 200
val_portion = 0.1
early_stopping = 8
dropout = 0.2
learning_rate = 1e-3
min_lr = 1e-4
warmup_iters = 100
beta2 = 0.99
compile = True
